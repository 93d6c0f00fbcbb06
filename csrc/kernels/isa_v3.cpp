// x86-64-v3: AVX2, F16C. The standard headers stand before the pragma: what they define
// inline may be merged with other files' copies and must run everywhere.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "blocks.h"

#pragma GCC target("arch=x86-64-v3")
#include <immintrin.h>

#define FASTMTO_ISA v3
#define FASTMTO_LEVEL 3
#define FASTMTO_VECTOR_BYTES 32
#include "loops.h"

#endif
