// The layers with one set of weights per task.
#include "channel_sums_oracle.h"
#include "conv_oracle.h"
#include "norm_oracle.h"
#include "patches_oracle.h"
#include "product_oracle.h"

namespace imaml {
namespace {

template <typename T>
void test_conv(const ConvShape& s) {
  context = describe(s, sizeof(T) == 4 ? "float" : "double");
  for (const bool biased : {false, true}) {
    const ConvProblem<T> problem(s, /*gap=*/biased ? 5 : 0, 1);
    const ConvResults<T> serial = run_conv(problem, biased);
    for (int64_t task = 0; task < s.tasks; ++task) check_conv(problem, biased, serial, task);
    expect(run_conv(problem, biased, 5, Threads{3}).same(serial),
           "the number of threads changes the bits");
  }
}

template <typename T>
void test_conv_of_equal_values(const ConvShape& s) {
  context = describe(s, sizeof(T) == 4 ? "equal float" : "equal double");
  ConvProblem<T> problem(s, 0, 1);
  std::fill(problem.x.begin(), problem.x.end(), T(0.1));
  std::fill(problem.g.begin(), problem.g.end(), T(0.3));
  check_conv(problem, false, run_conv(problem, false), 0);
}

constexpr shim::Device kWithClusters{{132, 66, 33, 16, 0}, {48000, 48000, 48000, 48000, 0}};
constexpr shim::Device kWithoutClusters{{108}, {48000}};

// The result of call(), which must not depend on the order of the emulated threads. Tries all
// orders or three.
template <typename Call>
auto on_cuda(const Call& call, bool in_every_order = true) {
  shim::order = shim::Order::kForwards;
  const auto first = call();
  std::vector<shim::Order> orders = {shim::Order::kWarpByWarp, shim::Order::kLastWarpFirst};
  if (in_every_order)
    orders.insert(orders.end(), {shim::Order::kBackwards, shim::Order::kShuffled});
  for (auto order : orders) {
    shim::order = order;
    expect(call().same(first), "the order of threads changes the bits: a race");
  }
  return first;
}

template <typename T>
void test_norm(const NormShape& s, bool relu) {
  context = std::string(sizeof(T) == 4 ? "norm<float> " : "norm<double> ") +
            std::to_string(s.tasks) + " " + std::to_string(s.rows) + " " +
            std::to_string(s.channels) + (relu ? " relu" : "");
  NormProblem<T> problem(s, relu, 0);
  problem.gap = s.rows % 2 == 1 ? 5 : 0;
  const NormResults<T> serial = run_norm(problem);
  for (int64_t task = 0; task < s.tasks; ++task)
    for (int64_t channel = 0; channel < s.channels; ++channel)
      check_norm(problem, serial, task, channel);
  expect(run_norm(problem, 5, Threads{3}).same(serial), "the number of threads changes the bits");
  for (const bool clusters : {false, true}) {
    if (clusters && cuda::norm_blocks(s.rows, true) == 1) continue;
    shim::device = clusters ? kWithClusters : kWithoutClusters;
    context += clusters ? " in clusters" : " on cuda";
    const NormResults<T> device =
        on_cuda([&] { return run_norm_on_cuda(problem); }, /*in_every_order=*/s.channels < 10);
    for (int64_t task = 0; task < s.tasks; ++task)
      for (int64_t channel = 0; channel < s.channels; ++channel)
        check_norm(problem, device, task, channel);
  }
}

// Calls check(results) for the CPU, and for CUDA without and with clusters (of two blocks).
template <typename T, typename Check>
void for_norms(const NormProblem<T>& problem, const Check& check) {
  const std::string outer = context;
  context = outer + " cpu";
  check(run_norm(problem));
  for (const bool clusters : {false, true}) {
    context = outer + (clusters ? " in clusters" : " on cuda");
    shim::device = clusters ? kWithClusters : kWithoutClusters;
    check(on_cuda([&] { return run_norm_on_cuda(problem); }));
  }
  context = outer;
}

constexpr NormShape kTwoBlocks{.tasks = 2, .rows = 130, .channels = 3};

// Equal values with beta = 0 give y = 0, where the derivative of relu is 0, as in torch.
template <typename T>
void test_relu_at_zero() {
  context = sizeof(T) == 4 ? "relu at 0, float" : "relu at 0, double";
  NormProblem<T> problem(kTwoBlocks, /*relu=*/true, 1);
  std::fill(problem.x.begin(), problem.x.end(), T(0.3));
  std::fill(problem.beta.begin(), problem.beta.end(), T(0));
  for_norms(problem, [](const NormResults<T>& got) {
    for (const auto* zeros : {&got.y, &got.positive, &got.dx, &got.dgamma, &got.dbeta, &got.grad_g,
                              &got.grad_x, &got.grad_gamma})
      for (const T value : *zeros) expect(value == 0, "a result is not 0 where y is 0");
  });
}

// The variance is computed relative to a value of the channel; relative to 0, the mean would cancel
// it.
template <typename T>
void test_large_mean() {
  context = sizeof(T) == 4 ? "a large mean, float" : "a large mean, double";
  NormProblem<T> problem(kTwoBlocks, /*relu=*/false, 1), far = problem;
  const T mean = sizeof(T) == 4 ? T(1 << 12) : T(1 << 26);
  for (std::size_t i = 0; i < far.x.size(); ++i) {
    far.x[i] += mean;
    problem.x[i] = far.x[i] - mean;  // exact: the same values up to the mean
  }
  far.eps = problem.eps = 1e-9;
  const NormResults<T> want = run_norm(problem);
  for_norms(far, [&](const NormResults<T>& got) {
    for (std::size_t i = 0; i < want.scale.size(); ++i)
      expect_close<T>(double(got.scale[i]), double(want.scale[i]), double(want.scale[i]), "scale");
  });
}

template <typename T>
void test_patches(const ConvShape& s) {
  context = "patches of " + describe(s, sizeof(T) == 4 ? "float" : "double");
  const PatchProblem<T> problem(s, 1);
  const PatchResults<T> serial = run_patches(problem);
  check_patches(problem, serial);
  expect(run_patches(problem, Threads{3}).same(serial), "the number of threads changes the bits");
  check_patches(problem, on_cuda([&] { return run_patches_on_cuda(problem); }));
}

template <typename T>
void test_channel_sums(const NormShape& s) {
  context = std::string(sizeof(T) == 4 ? "channel_sums<float> " : "channel_sums<double> ") +
            std::to_string(s.rows) + " " + std::to_string(s.channels);
  const ChannelProblem<T> problem(s, 1);
  const ChannelSums<T> serial = run_channel_sums(problem);
  check_channel_sums(problem, serial);
  expect(run_channel_sums(problem, Threads{3}).same(serial),
         "the number of threads changes the bits");
  ChannelProblem<T> last = problem;
  last.shape.tasks = 1;
  last.g.erase(last.g.begin(), last.g.end() - s.rows * s.channels);
  for (const auto& device : {kWithoutClusters, kWithClusters}) {
    shim::device = device;
    const ChannelSums<T> got = on_cuda([&] { return run_channel_sums_on_cuda(problem); });
    check_channel_sums(problem, got);
    expect(run_channel_sums_on_cuda(problem, 1).same(got), "the alignment changes the bits");
    const std::vector<T> alone = run_channel_sums_on_cuda(last).sums;
    expect(std::equal(alone.begin(), alone.end(), got.sums.end() - s.channels),
           "a task changes another's bits");
  }
}

struct ProductSizes {
  int64_t tasks, rows, columns, terms;
};

template <typename T>
struct ProductResult {
  std::vector<T> y;
  bool same(const ProductResult& o) const { return same_bits(y, o.y); }
};

template <typename T>
void test_product(const ProductSizes& s) {
  for (const bool transpose_a : {false, true})
    for (const bool transpose_b : {false, true}) {
      const int64_t gap = transpose_a == transpose_b ? 0 : 3;
      const ProductProblem<T> problem(s.tasks, s.rows, s.columns, s.terms, transpose_a, transpose_b,
                                      gap, 1);
      context = describe(problem);
      check_product(problem, run_product(problem, Threads{3}));
      for (const bool clusters : {false, true}) {
        shim::device = {{132, clusters ? 66 : 0, clusters ? 33 : 0, clusters ? 16 : 0},
                        {227000, 227000, 227000, 227000}};
        const std::vector<T> got =
            on_cuda([&] { return ProductResult<T>{run_product_on_cuda(problem, at(gap))}; }).y;
        check_product(problem, got);
        const int64_t last = s.tasks - 1, results = problem.results();
        expect(same_bits(run_product_on_cuda(problem.only(last)),
                         std::vector<T>(got.begin() + last * results, got.end())),
               "a task changes another's bits");
      }
    }
}

void test_products() {
  // Every tile, whole and in part; terms that fill no quad, no chunk, and several chunks.
  for (const ProductSizes s :
       {ProductSizes{3, 1, 1, 1}, ProductSizes{2, 17, 9, 65}, ProductSizes{2, 33, 70, 9},
        ProductSizes{2, 64, 64, 33}, ProductSizes{2, 65, 5, 0}, ProductSizes{2, 20, 64, 576},
        ProductSizes{2, 64, 9, 530}, ProductSizes{1, 63, 17, 259}}) {
    test_product<float>(s);
    test_product<double>(s);
  }
  test_product<float>({1, 129, 257, 512});  // the large tile
}

void test_divisor() {
  context = "Divisor";
  std::mt19937_64 generator(1);
  const auto check = [](std::uint32_t n, std::uint32_t d) {
    const auto [whole, rest] = cuda::Divisor(d)(n);
    expect(whole == n / d && rest == n % d, "a quotient");
  };
  constexpr std::uint32_t kMost = (1u << 31) - 1;
  for (const std::uint32_t d : {1u, 2u, 3u, 7u, 9u, 64u, 576u, 1u << 16, (1u << 30) + 1, kMost}) {
    for (const std::uint32_t n : {0u, 1u, d - 1, d, 2 * (d / 2) + 1, kMost - 1, kMost}) check(n, d);
    check(kMost / d * d, d);
    check(kMost / d * d - 1, d);
  }
  for (int k = 0; k < 10000; ++k) {
    const auto n = static_cast<std::uint32_t>(generator() >> 33);
    const auto d = static_cast<std::uint32_t>(generator() >> (33 + generator() % 31));
    check(n, std::max(d, 1u));
  }
}

// The kernels index with 31 bits.
void test_fits_31_bits() {
  context = "fits_31_bits";
  constexpr int64_t kLimit = int64_t{1} << 31;
  const ConvShape small = shape_of(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0);
  const auto fits = [&](int64_t ConvShape::*size, int64_t value) {
    ConvShape s = small;
    s.*size = value;
    return fits_31_bits(s);
  };
  for (const auto size : {&ConvShape::in_h, &ConvShape::in_w, &ConvShape::channels,
                          &ConvShape::out_h, &ConvShape::out_w, &ConvShape::kernel_h})
    expect(fits(size, kLimit - 1) && !fits(size, kLimit), "a size");
  for (const auto size : {&ConvShape::pad_h, &ConvShape::pad_w})
    expect(fits(size, kLimit - 2) && !fits(size, kLimit - 1), "a padding");
}

}  // namespace

void test_layers() {
  // Around a tile's lanes (8 doubles, 16 floats) and rows (6), and with fewer channels than rows.
  for (const int64_t channels : {1, 3, 6, 7, 17})
    for (const int64_t filters : {1, 8, 15, 33}) {
      test_conv<float>(shape_of(2, 3, 5, 4, channels, filters, 3, 3, 2, 2, 1, 1));
      test_conv<double>(shape_of(2, 3, 5, 4, channels, filters, 3, 3, 2, 2, 1, 1));
    }
  // Every remainder of the pixels modulo a tile's rows.
  for (int64_t images = 1; images <= 7; ++images)
    test_conv<float>(shape_of(1, images, 3, 3, 4, 4, 3, 3, 1, 1, 1, 1));
  // Images of few-shot learning: outputs of 1 x 1, 2 x 2 and 7 x 7.
  for (const int64_t channels : {1, 3, 16, 64, 65})
    for (const int64_t side : {1, 4, 14})
      for (const int64_t images : {1, 5, 7, 20})
        if (side < 14 || images == 5)
          test_conv<float>(shape_of(2, images, side, side, channels, 17, 3, 3, 2, 2, 1, 1));
  test_conv<double>(shape_of(2, 5, 7, 7, 65, 9, 3, 3, 2, 2, 1, 1));
  // Every class of border pixels.
  for (const int64_t stride : {1, 2, 3})
    for (const int64_t pad : {0, 1, 2})
      for (const int64_t channels : {2, 7}) {
        test_conv<float>(shape_of(2, 5, 7, 6, channels, 9, 3, 3, stride, stride, pad, pad));
        test_conv<double>(shape_of(2, 1, 6, 7, channels, 9, 3, 2, stride, stride, pad, pad));
      }
  // More pixels, and more rows of a panel, than are processed at once.
  test_conv<float>(shape_of(1, 3, 9, 8, 33, 34, 3, 3, 1, 1, 1, 1));
  test_conv<double>(shape_of(1, 1, 9, 13, 33, 31, 3, 3, 1, 1, 1, 1));
  // More pixels than the weight gradient processes at once, in one image and in many, with one
  // job per class and with one per tap.
  for (const int64_t channels : {2, 6}) {
    test_conv<float>(shape_of(1, 2, 12, 11, channels, 5, 3, 3, 1, 1, 1, 1));
    test_conv<float>(shape_of(1, 2, 20, 17, channels, 5, 3, 3, 1, 1, 1, 1));
    test_conv<float>(shape_of(1, 70, 4, 4, channels, 5, 3, 3, 2, 2, 1, 1));
  }
  // Even, odd and pointwise kernels, strides larger than the kernel and than the image, padding
  // larger than the kernel, a kernel as large as the image.
  for (const auto& s :
       {shape_of(3, 2, 6, 5, 3, 4, 2, 3, 1, 2, 0, 1), shape_of(2, 2, 7, 7, 3, 4, 1, 1, 1, 1, 0, 0),
        shape_of(2, 2, 7, 5, 3, 4, 1, 2, 3, 3, 0, 0), shape_of(1, 2, 3, 3, 7, 4, 2, 2, 5, 4, 1, 0),
        shape_of(1, 2, 2, 3, 2, 4, 2, 2, 2, 1, 3, 2),
        shape_of(2, 3, 4, 4, 5, 9, 4, 4, 1, 1, 0, 0)}) {
    test_conv<float>(s);
    test_conv<double>(s);
    test_patches<float>(s);
    test_patches<double>(s);
  }
  test_products();
  test_divisor();
  test_fits_31_bits();
  // Images of one block and of several; windows that read a pixel many times or never.
  test_patches<float>(shape_of(2, 2, 14, 13, 9, 1, 3, 3, 2, 2, 1, 1));
  test_patches<double>(shape_of(1, 3, 17, 16, 5, 1, 3, 2, 1, 1, 1, 0));
  test_patches<float>(shape_of(2, 1, 9, 9, 2, 1, 2, 2, 3, 4, 0, 0));
  test_conv_of_equal_values<float>(shape_of(1, 60, 7, 7, 2, 3, 3, 3, 1, 1, 1, 1));
  test_conv_of_equal_values<double>(shape_of(1, 60, 7, 7, 2, 3, 3, 3, 1, 1, 1, 1));
  for (const bool relu : {false, true})
    for (const int64_t channels : {1, 15, 16, 17, 40})
      for (const int64_t rows : {2, 5, 64, 65, 130}) {
        test_norm<float>({.tasks = 3, .rows = rows, .channels = channels}, relu);
        test_norm<double>({.tasks = 3, .rows = rows, .channels = channels}, relu);
      }
  // Every number of blocks in a cluster; more rows than a thread reads at once.
  for (const int64_t rows : {128, 129, 257, 513, 1200})
    test_norm<float>({.tasks = 1, .rows = rows, .channels = 9}, /*relu=*/rows % 2 == 1);
  test_norm<double>({.tasks = 1, .rows = 600, .channels = 3}, true);
  // Around a vector, the channels of a block, a block's rows, and every number of blocks.
  for (const int64_t channels : {1, 2, 3, 4, 8, 31, 32, 36, 64})
    for (const int64_t rows : {1, 20, 33, 128, 129, 300, 1100}) {
      if (rows > 300 && channels != 3 && channels != 36) continue;
      test_channel_sums<float>({.tasks = 2, .rows = rows, .channels = channels});
      test_channel_sums<double>({.tasks = 2, .rows = rows, .channels = channels});
    }
  test_relu_at_zero<float>();
  test_relu_at_zero<double>();
  test_large_mean<float>();
  test_large_mean<double>();
}

}  // namespace imaml
