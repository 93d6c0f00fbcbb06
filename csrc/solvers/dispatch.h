// One body, compiled for several instruction sets; chosen once, when the library is loaded.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FASTMTO_X86 1
#define FASTMTO_AVX2 __attribute__((target("avx2")))
#define FASTMTO_AVX512 __attribute__((target("avx2,avx512f,avx512dq,avx512vl")))
#endif

namespace fastmto::solvers {

enum class InstructionSet { kPlain, kAvx2, kAvx512 };

inline InstructionSet instruction_set() {
#ifdef FASTMTO_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return InstructionSet::kAvx512;
  if (__builtin_cpu_supports("avx2")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kPlain;
}

}  // namespace fastmto::solvers

// FASTMTO_DISPATCH(body, (parameters), (arguments)) defines `body_chosen`, a pointer to the copy
// of the always-inline function `body` for this machine. To stand in an anonymous namespace.
#ifdef FASTMTO_X86
#define FASTMTO_DISPATCH(body, parameters, arguments)                       \
  Status body##_plain parameters { return body arguments; }                 \
  FASTMTO_AVX2 Status body##_avx2 parameters { return body arguments; }     \
  FASTMTO_AVX512 Status body##_avx512 parameters { return body arguments; } \
  Status(*const body##_chosen) parameters =                                 \
      instruction_set() == InstructionSet::kAvx512 ? body##_avx512          \
      : instruction_set() == InstructionSet::kAvx2 ? body##_avx2            \
                                                   : body##_plain;
#else
#define FASTMTO_DISPATCH(body, parameters, arguments)       \
  Status body##_plain parameters { return body arguments; } \
  Status(*const body##_chosen) parameters = body##_plain;
#endif
