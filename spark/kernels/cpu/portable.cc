// The baseline of whatever machine this is compiled for: SSE2 on x86-64, NEON on 64-bit ARM.
#include "begin.h"
#define SPARK_SET portable
#define SPARK_WIDTH 4
#include "bodies.h"
