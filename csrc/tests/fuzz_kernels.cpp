// Runs the kernels on inputs drawn at random, and checks what must hold of any of them:
//   where the numbers are moderate, the formulas in float64, as the tests have them;
//   the same bits for any number of threads, at any alignment, and for a row or task alone;
//   so a row or task that is not finite leaves the others alone, and a frozen row is left alone;
//   a row of cg_step that is not finite says so, and its x is 0;
//   nothing is written but the outputs, and all of them are.
// Sanitizers check the rest: -DIMAML_SANITIZE=address,undefined and =thread. The threads are
// std::threads: torch's pool runs on libgomp, whose barriers ThreadSanitizer takes for races.
//
// Input k of a run comes from seed S + k alone, so that a failure is run again by what it prints.
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

constexpr void (*kKernels[])(Draw&) = {
    fuzz_cg_step<float>,  fuzz_cg_step<double>,  fuzz_prox_step<float>,  fuzz_prox_step<double>,
    fuzz_row_sums<float>, fuzz_row_sums<double>, fuzz_conv<float>,       fuzz_conv<double>,
    fuzz_patches<float>,  fuzz_patches<double>,  fuzz_batch_norm<float>, fuzz_batch_norm<double>};

std::uint64_t running = 0;  // the input's seed

// Also from a signal's handler.
void tell_seed() {
  char text[100];
  const int length =
      std::snprintf(text, sizeof text, "\nagain: fuzz_kernels --seed %llu --count 1\n",
                    static_cast<unsigned long long>(running));
  if (write(STDERR_FILENO, text, static_cast<std::size_t>(length)) < 0) return;
}

void tell_seed_at_death() {
#if defined(IMAML_SANITIZED)
  __sanitizer_set_death_callback(tell_seed);
#endif
  for (const int signal : {SIGABRT, SIGFPE, SIGILL, SIGSEGV, SIGBUS})
    std::signal(signal, [](int number) {
      tell_seed();
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
  if (failures > 0) tell_seed();
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
// Or a race would be told, and the next input tried. Hidden, it would not be found by the runtime.
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
  imaml::tell_seed_at_death();
  std::printf("instruction set: %s\n", imaml::cpu::instruction_set());
  return imaml::fuzz(settings);
}
