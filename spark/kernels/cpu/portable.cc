// The compiler's baseline for the target: SSE2 on x86-64, NEON on 64-bit ARM.
#include "baseline.h"
#define SPARK_SET portable
#define SPARK_WIDTH 4
#include "entry_points.h"
