// Operands as a kernel sees them: each in an allocation of its own, which ends where the operand
// ends, so that AddressSanitizer sees the next element, and aligned no better than its type asks.
#pragma once
#include "harness.h"

namespace imaml {

class Operands {
 public:
  // Elements before each operand: what misaligns it, from the 64 bytes that an allocation offers.
  explicit Operands(std::size_t offset = 0) : offset_(offset) {}

  // A copy that the kernel may write; give_back() puts it into `values`.
  template <typename T>
  T* out(std::vector<T>& values) {
    T* copy = place(values);
    returns_.push_back([&values, copy, this] { std::copy_n(copy, values.size(), values.data()); });
    return copy;
  }

  // A copy that it may not. `values` has to live until give_back().
  template <typename T>
  const T* in(const std::vector<T>& values) {
    const T* copy = place(values);
    returns_.push_back([&values, copy] {
      expect(values.empty() || !std::memcmp(copy, values.data(), values.size() * sizeof(T)),
             "an operand that is read alone was written");
    });
    return copy;
  }

  // Null if there is no such operand.
  template <typename T>
  T* out_or_null(std::vector<T>& values) {
    return values.empty() ? nullptr : out(values);
  }
  template <typename T>
  const T* in_or_null(const std::vector<T>& values) {
    return values.empty() ? nullptr : in(values);
  }

  // Also checks that nothing was written around any operand.
  void give_back() {
    for (const auto& one : returns_) one();
    for (const Block& block : blocks_)
      for (std::size_t i = 0; i < block.size; ++i)
        if (i < block.begin || i >= block.end)
          expect(block.bytes[i] == kGuard, "written outside of an operand");
    returns_.clear();
    blocks_.clear();
  }

 private:
  static constexpr unsigned char kGuard = 0xa5;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr std::size_t kBehind = 0;  // the sanitizer watches, reads too
#else
  static constexpr std::size_t kBehind = 64;
#endif

  struct Block {
    std::unique_ptr<unsigned char[]> bytes;
    std::size_t size, begin, end;
  };

  template <typename T>
  T* place(const std::vector<T>& values) {
    const std::size_t begin = offset_ * sizeof(T), end = begin + values.size() * sizeof(T);
    const std::size_t size = end + kBehind;
    blocks_.push_back({std::make_unique<unsigned char[]>(size), size, begin, end});
    unsigned char* bytes = blocks_.back().bytes.get();
    std::memset(bytes, kGuard, size);
    if (!values.empty()) std::memcpy(bytes + begin, values.data(), end - begin);
    return reinterpret_cast<T*>(bytes + begin);
  }

  std::size_t offset_;
  std::vector<Block> blocks_;
  std::vector<std::function<void()>> returns_;
};

}  // namespace imaml
