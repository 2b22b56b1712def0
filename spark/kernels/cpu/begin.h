// Before an instruction set is switched on: what these headers define inline must run on any machine, since the linker keeps one
// copy for all.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "lookups.h"
