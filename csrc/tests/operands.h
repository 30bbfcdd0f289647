// The operands of a kernel, each in a separate allocation that ends with the operand, so that
// AddressSanitizer detects access to the next element, and with no more alignment than its type
// needs.
#pragma once
#include "harness.h"

namespace imaml {

class Operands {
 public:
  // `offset` elements precede each operand, to misalign it.
  explicit Operands(std::size_t offset = 0) : offset_(offset) {}

  // A copy that the kernel may write; copy_back() copies it to `values`.
  template <typename T>
  T* out(std::vector<T>& values) {
    T* copy = allocate(values);
    checks_.push_back([&values, copy, this] { std::copy_n(copy, values.size(), values.data()); });
    return copy;
  }

  // A copy that the kernel must not write. `values` must live until copy_back().
  template <typename T>
  const T* in(const std::vector<T>& values) {
    const T* copy = allocate(values);
    checks_.push_back([&values, copy] {
      expect(values.empty() || !std::memcmp(copy, values.data(), values.size() * sizeof(T)),
             "a read-only operand was written");
    });
    return copy;
  }

  // Null for empty `values`.
  template <typename T>
  T* out_or_null(std::vector<T>& values) {
    return values.empty() ? nullptr : out(values);
  }
  template <typename T>
  const T* in_or_null(const std::vector<T>& values) {
    return values.empty() ? nullptr : in(values);
  }

  // Also checks that nothing was written outside an operand.
  void copy_back() {
    for (const auto& one : checks_) one();
    for (const Block& block : blocks_)
      for (std::size_t i = 0; i < block.size; ++i)
        if (i < block.begin || i >= block.end)
          expect(block.bytes[i] == kGuard, "written outside an operand");
    checks_.clear();
    blocks_.clear();
  }

 private:
  static constexpr unsigned char kGuard = 0xa5;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr std::size_t kGuardBytes = 0;  // the sanitizer detects writes and reads
#else
  static constexpr std::size_t kGuardBytes = 64;
#endif

  struct Block {
    std::unique_ptr<unsigned char[]> bytes;
    std::size_t size, begin, end;
  };

  template <typename T>
  T* allocate(const std::vector<T>& values) {
    const std::size_t begin = offset_ * sizeof(T), end = begin + values.size() * sizeof(T);
    const std::size_t size = end + kGuardBytes;
    blocks_.push_back({std::make_unique<unsigned char[]>(size), size, begin, end});
    unsigned char* bytes = blocks_.back().bytes.get();
    std::memset(bytes, kGuard, size);
    if (!values.empty()) std::memcpy(bytes + begin, values.data(), end - begin);
    return reinterpret_cast<T*>(bytes + begin);
  }

  std::size_t offset_;
  std::vector<Block> blocks_;
  std::vector<std::function<void()>> checks_;
};

}  // namespace imaml
