// Fibers: functions with stacks of their own that one OS thread switches between.
#pragma once
#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define IMAML_FIBER_ASAN 1
#endif

namespace shim {

constexpr std::size_t kStackBytes = 64 * 1024;

#if defined(__x86_64__)

// The stack pointer of a suspended context, whose registers are on its stack.
using Context = void*;

// Not swapcontext, which makes a system call to restore the signal mask.
__attribute__((naked, noinline)) inline void switch_context(Context*, Context*) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov (%rsi), %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}

inline void prepare(Context& context, char* stack, void (*entry)()) {
  auto top = (reinterpret_cast<std::uintptr_t>(stack) + kStackBytes) & ~std::uintptr_t{15};
  std::uintptr_t* frame = reinterpret_cast<std::uintptr_t*>(top) - 8;
  for (int k = 0; k < 8; ++k) frame[k] = 0;  // six registers, `entry`, and no return address
  frame[6] = reinterpret_cast<std::uintptr_t>(entry);
  context = frame;
}

#else

using Context = ucontext_t;

inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }

inline void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

// AddressSanitizer has to know which stack is in use: start_switch before switch_context and
// finish_switch after it. `save` keeps the fake stack of the context that is left.
inline void start_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack,
                         [[maybe_unused]] std::size_t size) {
#if defined(IMAML_FIBER_ASAN)
  __sanitizer_start_switch_fiber(save, stack, size);
#endif
}
inline void finish_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** stack,
                          [[maybe_unused]] std::size_t* size) {
#if defined(IMAML_FIBER_ASAN)
  __sanitizer_finish_switch_fiber(fake, stack, size);
#endif
}

}  // namespace shim
