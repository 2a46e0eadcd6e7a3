// A stack of its own for each thread of the emulated GPU, and how to change from one to another.
//
// ucontext would do, but it asks the kernel for the signal mask at every change, which takes longer
// than all the rest of the emulation.
#pragma once

#include <cstdint>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

#if defined(__x86_64__)

// Saves the registers that a function must keep and the stack pointer, and goes on where `to` was
// left.
asm(R"(
.text
.p2align 4
.type emulator_change, @function
emulator_change:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_change, . - emulator_change
)");
extern "C" void emulator_change(void** from, void* to);

class Stack {
 public:
  // To begin with `entry`, which never returns.
  void prepare(std::vector<char>& memory, void (*entry)()) {
    const uintptr_t end = reinterpret_cast<uintptr_t>(memory.data() + memory.size()) / 16 * 16;
    void** top = reinterpret_cast<void**>(end);
    top[-1] = nullptr;  // where a caller's address would lie
    top[-2] = reinterpret_cast<void*>(entry);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    pointer_ = top - 8;
  }
  void change_to(Stack& other) { emulator_change(&pointer_, other.pointer_); }

 private:
  void* pointer_ = nullptr;
};

#else

class Stack {
 public:
  void prepare(std::vector<char>& memory, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = memory.data();
    context_.uc_stack.ss_size = memory.size();
    makecontext(&context_, entry, 0);
  }
  void change_to(Stack& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace emulator
