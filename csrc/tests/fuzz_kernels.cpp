// Runs the kernels on random inputs and checks, for every input:
//   with moderate values, the formulas in float64, as in the tests;
//   the same bits for any number of threads, any alignment, and for a row or task on its own, so
//   that
//     a row or task that is not finite does not affect the others;
//   a frozen row does not change; a row of cg_step that is not finite is NONFINITE with x = 0;
//   all outputs are written, and nothing else.
// Run it also under sanitizers: -DIMAML_SANITIZE=address,undefined and =thread. The threads are
// std::threads because ThreadSanitizer reports the barriers of libgomp, torch's pool, as races.
//
// Input k depends only on seed S + k, so the printed command reproduces a failure.
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>

#include "fuzz.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#define IMAML_SANITIZED 1
#endif

namespace imaml {
namespace {

constexpr void (*kKernels[])(Draw&) = {fuzz_cg_step<float>,
                                       fuzz_cg_step<double>,
                                       fuzz_prox_step<float>,
                                       fuzz_prox_step<double>,
                                       fuzz_row_sums<float>,
                                       fuzz_row_sums<double>,
                                       fuzz_conv<float>,
                                       fuzz_conv<double>,
                                       fuzz_patches<float>,
                                       fuzz_patches<double>,
                                       fuzz_batch_norm<float>,
                                       fuzz_batch_norm<double>,
                                       fuzz_channel_sums<float>,
                                       fuzz_channel_sums<double>,
                                       fuzz_batched_product<float>,
                                       fuzz_batched_product<double>,
                                       fuzz_map<float>,
                                       fuzz_map<double>,
                                       fuzz_reduction<float>,
                                       fuzz_reduction<double>,
                                       fuzz_product<float>,
                                       fuzz_product<double>,
                                       fuzz_indexing<float>,
                                       fuzz_indexing<double>};

std::uint64_t running = 0;  // the seed of the current input

// Also called by signal handlers.
void print_seed() {
  char text[100];
  const int length =
      std::snprintf(text, sizeof text, "\nreproduce: fuzz_kernels --seed %llu --count 1\n",
                    static_cast<unsigned long long>(running));
  if (write(STDERR_FILENO, text, static_cast<std::size_t>(length)) < 0) return;
}

void print_seed_at_death() {
#if defined(IMAML_SANITIZED)
  __sanitizer_set_death_callback(print_seed);
#endif
  for (const int signal : {SIGABRT, SIGFPE, SIGILL, SIGSEGV, SIGBUS})
    std::signal(signal, [](int number) {
      print_seed();
      std::signal(number, SIG_DFL);
      std::raise(number);
    });
}

struct Settings {
  std::uint64_t seed = 1;
  std::uint64_t count = std::numeric_limits<std::uint64_t>::max();
  double seconds = std::numeric_limits<double>::infinity();
};

bool read(int argc, char** argv, Settings& settings) {
  for (int k = 1; k < argc; k += 2) {
    if (k + 1 == argc) return false;
    const std::string name = argv[k];
    char* end = nullptr;
    if (name == "--seed")
      settings.seed = std::strtoull(argv[k + 1], &end, 10);
    else if (name == "--count")
      settings.count = std::strtoull(argv[k + 1], &end, 10);
    else if (name == "--seconds")
      settings.seconds = std::strtod(argv[k + 1], &end);
    else
      return false;
    if (end == argv[k + 1] || *end != '\0') return false;
  }
  return argc > 1;
}

int fuzz(const Settings& settings) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
  std::uint64_t done = 0;
  for (; done < settings.count && failures == 0 && seconds() < settings.seconds; ++done) {
    running = settings.seed + done;
    Draw draw(running);
    draw.one_of(kKernels)(draw);
  }
  if (failures > 0) print_seed();
  for (const auto& [kernel, inputs] : tried)
    std::printf("%10lld  %s\n", static_cast<long long>(inputs), kernel.c_str());
  std::printf("%10llu  inputs from seed %llu on, %.0f s, %lld checks, %d failed\n",
              static_cast<unsigned long long>(done), static_cast<unsigned long long>(settings.seed),
              seconds(), static_cast<long long>(checks), failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace imaml

#if defined(__SANITIZE_THREAD__)
// Stop at the first race. The runtime finds this function only if it is visible.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() {
  return "halt_on_error=1:exitcode=1";
}
#endif

int main(int argc, char** argv) {
  imaml::Settings settings;
  if (!imaml::read(argc, argv, settings)) {
    std::fprintf(stderr, "usage: fuzz_kernels --seed SEED [--count INPUTS] [--seconds SECONDS]\n");
    return 2;
  }
  imaml::print_seed_at_death();
  std::printf("instruction set: %s\n", imaml::cpu::instruction_set());
  return imaml::fuzz(settings);
}
