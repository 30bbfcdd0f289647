// IMAML_MULTIVERSION compiles a function once per instruction set; the loader chooses one (ifunc).
// So a wheel built on any machine uses AVX-512 where available. Needs GCC >= 12 or Clang >= 17 on
// x86-64 with glibc; elsewhere it is empty and the baseline runs.
#pragma once

// For lambdas inside such a function: one that is not inlined would be compiled for the baseline.
#define IMAML_INLINE_LAMBDA __attribute__((always_inline))

#include <cstdint>  // defines __GLIBC__

#if !defined(IMAML_NO_MULTIVERSION) && defined(__x86_64__) && defined(__ELF__) && \
    defined(__GLIBC__) &&                                                         \
    ((defined(__clang__) && __clang_major__ >= 17) || (!defined(__clang__) && __GNUC__ >= 12))
#define IMAML_MULTIVERSION \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define IMAML_HAS_MULTIVERSION 1
#else
#define IMAML_MULTIVERSION
#endif
