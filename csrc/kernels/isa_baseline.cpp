// The plain build: SSE2 on x86-64, NEON on arm64.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "blocks.h"

#define FASTMTO_ISA baseline
#define FASTMTO_LEVEL 0
#define FASTMTO_VECTOR_BYTES 16
#include "loops.h"
