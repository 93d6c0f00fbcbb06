// x86-64-v4: AVX-512 with fused multiply-adds and estimates. The standard headers stand before the pragma: what they define
// inline may be merged with other files' copies and must run everywhere.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "blocks.h"

#pragma GCC target("arch=x86-64-v4")
#include <immintrin.h>
// gcc 12 warns of its own "undefined" vectors inside the intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#define FASTMTO_ISA v4
#define FASTMTO_LEVEL 4
#define FASTMTO_VECTOR_BYTES 64
#include "loops.h"

#endif
