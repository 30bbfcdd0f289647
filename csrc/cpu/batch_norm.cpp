// Functions of vectors are inlined, so their calling convention does not matter. As a template
// argument, a vector type has its natural alignment.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wignored-attributes"
#include "cpu/batch_norm.h"

#include <algorithm>
#include <vector>

#include "cpu/isa.h"

namespace imaml {

// Eight lanes in float64.
using Wide = double __attribute__((vector_size(64), aligned(8)));
template <>
struct Factor<Wide, float __attribute__((vector_size(32)))> {
  template <typename Vector>
  IMAML_INLINE static Wide of(const Vector& x) {
    return __builtin_convertvector(x, Wide);
  }
};

namespace cpu {
namespace {

// One vector register of AVX2. Its lanes are channels, so the formulas apply to vectors as well.
template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = float __attribute__((vector_size(32), aligned(4)));
};
template <>
struct VectorOf<double> {
  using type = double __attribute__((vector_size(32), aligned(8)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
inline constexpr int64_t kStripLanes = 32 / sizeof(T);

// Up to kStripLanes channels of a task: `number` counts from the task's first block, `channel` is
// an index into tensors with one entry per channel.
struct Strip {
  int64_t task, number, channel, width;

  std::size_t index() const { return static_cast<std::size_t>(number); }
  ChannelCoord coord(int64_t lane) const { return {task, channel + lane}; }
};

// The elements of a strip in one row, at `index` of tensors like x.
template <typename T, bool kFull>
struct Elements {
  int64_t index, width;

  IMAML_INLINE Vector<T> of(const T* from) const {
    if constexpr (kFull) return *reinterpret_cast<const Vector<T>*>(from + index);
    Vector<T> values{};
    for (int64_t lane = 0; lane < width; ++lane) values[lane] = from[index + lane];
    return values;
  }
  IMAML_INLINE void set(T* to, Vector<T> values) const {
    if constexpr (kFull)
      *reinterpret_cast<Vector<T>*>(to + index) = values;
    else
      for (int64_t lane = 0; lane < width; ++lane) to[index + lane] = values[lane];
  }
};

// Some rows of a strip, `stride` elements apart, the first at `index`.
template <typename T>
struct Chunk {
  int64_t index, width, rows, stride;

  // Calls visit(elements) for every row.
  template <typename Visit>
  IMAML_INLINE void for_rows(const Visit& visit) const {
    if (width == kStripLanes<T>)
#pragma GCC unroll 1
      for (int64_t row = 0; row < rows; ++row)
        visit(Elements<T, true>{index + row * stride, width});
    else
#pragma GCC unroll 1
      for (int64_t row = 0; row < rows; ++row)
        visit(Elements<T, false>{index + row * stride, width});
  }

  // Adds to sums[k] over the rows the terms that add_terms(elements, add) passes to add(k, term).
  template <int kSums, typename Sum, typename AddTerms>
  IMAML_INLINE void sum(Sum (&sums)[kSums], const AddTerms& add_terms) const {
    for_rows([&](const auto& elements) IMAML_INLINE_LAMBDA {
      add_terms(elements, [&](int k, const auto& term) IMAML_INLINE_LAMBDA { sums[k] += term; });
    });
  }
};

// kCount numbers for each channel of a strip.
template <int kCount, typename T>
struct Table {
  T values[kCount][kStripLanes<T>] = {};

  IMAML_INLINE Vector<T> at(int k) const { return *reinterpret_cast<const Vector<T>*>(values[k]); }
};

// kSums sums, or means, for each channel of a strip.
template <int kSums, typename T>
struct Sums {
  double values[kSums][kStripLanes<T>] = {};

  bool finite() const {
    double rest = 0;  // NaN if a sum is not finite
    for (const auto& lanes : values)
      for (const double lane : lanes) rest += lane - lane;
    return rest == 0;
  }
  template <typename Sum>
  IMAML_INLINE void add(const Sum (&part)[kSums]) {
    for (int k = 0; k < kSums; ++k)
      for (int64_t lane = 0; lane < kStripLanes<T>; ++lane)
        values[k][lane] += static_cast<double>(part[k][lane]);
  }
};

// The strips of some blocks of a task.
template <typename T>
struct TaskStrips {
  const NormShape& shape;
  int64_t task, first, last;  // channels

  IMAML_INLINE TaskStrips(const NormShape& shape, int64_t task, Blocks blocks)
      : shape(shape),
        task(task),
        first(blocks.first * kNormLanes),
        last(std::min(shape.channels, blocks.last * kNormLanes)) {}

  // An Entry for every strip.
  template <typename Entry>
  std::vector<Entry> table() const {
    return std::vector<Entry>(
        static_cast<std::size_t>((last - first + kStripLanes<T> - 1) / kStripLanes<T>));
  }

  template <typename Visit>
  IMAML_INLINE void for_strips(const Visit& visit) const {
    int64_t number = 0;
    for (int64_t at = first; at < last; at += kStripLanes<T>)
      visit(Strip{task, number++, task * shape.channels + at, std::min(kStripLanes<T>, last - at)});
  }

  // Calls visit(strip, chunk), for all strips of kNormRows rows before the next rows.
  template <typename Visit>
  IMAML_INLINE void for_chunks(const Visit& visit) const {
    for (int64_t row = 0; row < shape.rows; row += kNormRows)
      for_strips([&](const Strip& strip) IMAML_INLINE_LAMBDA {
        visit(strip, Chunk<T>{index(strip, row), strip.width, std::min(kNormRows, shape.rows - row),
                              shape.channels});
      });
  }

  // Of the strip's first element in a row, in tensors like x.
  IMAML_INLINE int64_t index(const Strip& strip, int64_t row) const {
    return (task * (shape.rows - 1) + row) * shape.channels + strip.channel;
  }

  // Adds up sums with add(strip, chunk, sums, zero), where terms have the type of zero; then calls
  // use(strip, means) for every strip. float32 terms may overflow where float64 ones do not, so
  // strips whose sums are not finite are added up once more.
  template <int kSums, typename Add, typename Use>
  IMAML_INLINE void reduce(const Add& add, const Use& use) const {
    auto table = this->template table<Sums<kSums, T>>();
    for_chunks([&](const Strip& strip, const Chunk<T>& chunk)
                   IMAML_INLINE_LAMBDA { add(strip, chunk, table[strip.index()], Vector<T>{}); });
    if constexpr (sizeof(T) < sizeof(double)) {
      auto again = this->template table<char>();
      bool any = false;
      for_strips([&](const Strip& strip) IMAML_INLINE_LAMBDA {
        if (table[strip.index()].finite()) return;
        again[strip.index()] = any = true;
        table[strip.index()] = {};
      });
      if (any)
        for_chunks([&](const Strip& strip, const Chunk<T>& chunk) IMAML_INLINE_LAMBDA {
          if (again[strip.index()]) add(strip, chunk, table[strip.index()], Wide{});
        });
    }
    for_strips([&](const Strip& strip) IMAML_INLINE_LAMBDA {
      auto& means = table[strip.index()].values;
      for (auto& lanes : means)
        for (double& lane : lanes) lane /= static_cast<double>(shape.rows);
      use(strip, means);
    });
  }
};

// The members of a NormChannel. A struct of vectors would be copied in parts of 16 bytes.
template <typename T>
struct Channels : Table<4, T> {
  template <typename Pass>
  IMAML_INLINE void set(const Pass& p, const Strip& strip) {
    for (int64_t lane = 0; lane < strip.width; ++lane) {
      const auto [mean, scale, factor, shift] = norm_channel(p, strip.coord(lane));
      const T of_lane[] = {mean, scale, factor, shift};
      for (int k = 0; k < 4; ++k) this->values[k][lane] = of_lane[k];
    }
  }
  IMAML_INLINE NormChannel<Vector<T>> get() const {
    return {this->at(0), this->at(1), this->at(2), this->at(3)};
  }
};

template <bool kPositive, typename T>
IMAML_INLINE void run(const NormForward<T>& p, const TaskStrips<T>& all) {
  using V = Vector<T>;
  auto channels = all.template table<Channels<T>>();
  all.template reduce<2>(
      [&](const Strip& strip, const Chunk<T>& chunk, Sums<2, T>& sums,
          auto zero) IMAML_INLINE_LAMBDA {
        // Relative to the chunk's first row in T, then to the task's first row in float64.
        Table<2, T> origins;
        for (int64_t lane = 0; lane < strip.width; ++lane) {
          origins.values[0][lane] = p.x[chunk.index + lane];
          origins.values[1][lane] = p.x[all.index(strip, 0) + lane];
        }
        const V origin = origins.at(0);
        decltype(zero) part[2] = {};
        chunk.sum(part, [&](const auto& e, const auto& add) IMAML_INLINE_LAMBDA {
          norm_terms<decltype(zero)>(e.of(p.x), origin, add);
        });
        sums.add(part);
        const double rows = static_cast<double>(chunk.rows);
        for (int64_t lane = 0; lane < kStripLanes<T>; ++lane) {
          const double shift = static_cast<double>(origins.values[0][lane]) -
                               static_cast<double>(origins.values[1][lane]);
          sums.values[0][lane] += rows * shift;
          sums.values[1][lane] += (2 * static_cast<double>(part[0][lane]) + rows * shift) * shift;
        }
      },
      [&](const Strip& strip, auto& means) IMAML_INLINE_LAMBDA {
        const T* first = p.x + all.index(strip, 0);
        for (int64_t lane = 0; lane < strip.width; ++lane) {
          p.mean[strip.channel + lane] = norm_mean(first[lane], means[0][lane]);
          p.scale[strip.channel + lane] = norm_scale<T>(means[0][lane], means[1][lane], p.eps);
        }
        channels[strip.index()].set(p, strip);
      });
  all.for_chunks([&](const Strip& strip, const Chunk<T>& chunk) IMAML_INLINE_LAMBDA {
    const NormChannel<V> channel = channels[strip.index()].get();
    chunk.for_rows([&](const auto& e) IMAML_INLINE_LAMBDA {
      const V y = channel.y(e.of(p.x));
      e.set(p.y, y);
      if constexpr (kPositive) e.set(p.positive, positive_part(y));
    });
  });
}

template <bool kRelu, typename T>
IMAML_INLINE void run(const NormBackward<T>& p, const TaskStrips<T>& all) {
  using V = Vector<T>;
  auto channels = all.template table<Channels<T>>();
  auto rounded = all.template table<Table<2, T>>();
  all.for_strips([&](const Strip& strip)
                     IMAML_INLINE_LAMBDA { channels[strip.index()].set(p, strip); });
  all.template reduce<2>(
      [&](const Strip& strip, const Chunk<T>& chunk, Sums<2, T>& sums, auto zero)
          IMAML_INLINE_LAMBDA {
            const NormChannel<V> channel = channels[strip.index()].get();
            decltype(zero) part[2] = {};
            chunk.sum(part, [&](const auto& e, const auto& add) IMAML_INLINE_LAMBDA {
              const V x = e.of(p.x), g = channel.template relu_grad<kRelu>(x, e.of(p.g));
              norm_backward_terms<decltype(zero)>(channel.h(x), g, add);
            });
            sums.add(part);
          },
      [&](const Strip& strip, auto& means) IMAML_INLINE_LAMBDA {
        const double rows = static_cast<double>(all.shape.rows);
        for (int64_t lane = 0; lane < strip.width; ++lane) {
          p.dbeta[strip.channel + lane] = static_cast<T>(rows * means[0][lane]);
          p.dgamma[strip.channel + lane] = static_cast<T>(rows * means[1][lane]);
          for (int k = 0; k < 2; ++k)
            rounded[strip.index()].values[k][lane] = static_cast<T>(means[k][lane]);
        }
      });
  all.for_chunks([&](const Strip& strip, const Chunk<T>& chunk) IMAML_INLINE_LAMBDA {
    const NormChannel<V> channel = channels[strip.index()].get();
    const V mean_g = rounded[strip.index()].at(0), mean_hg = rounded[strip.index()].at(1);
    chunk.for_rows([&](const auto& e) IMAML_INLINE_LAMBDA {
      const V x = e.of(p.x), g = channel.template relu_grad<kRelu>(x, e.of(p.g));
      e.set(p.dx, norm_dx(channel, channel.h(x), g, mean_g, mean_hg));
    });
  });
}

// The members of a NormCoefficients.
template <typename T>
struct Coefficients : Table<9, T> {
  IMAML_INLINE void set(int64_t lane, const NormCoefficients<T>& c) {
    const T of_lane[] = {c.mean_a, c.mean_g, c.mean_ha, c.mean_hg, c.b,
                         c.c,      c.on_pg,  c.on_pa,   c.on_h};
    for (int k = 0; k < 9; ++k) this->values[k][lane] = of_lane[k];
  }
  IMAML_INLINE NormCoefficients<Vector<T>> get() const {
    return {this->at(0), this->at(1), this->at(2), this->at(3), this->at(4),
            this->at(5), this->at(6), this->at(7), this->at(8)};
  }
};

template <bool kRelu, typename T>
IMAML_INLINE void run(const NormDoubleBackward<T>& p, const TaskStrips<T>& all) {
  using V = Vector<T>;
  auto channels = all.template table<Channels<T>>();
  auto coefficients = all.template table<Coefficients<T>>();
  all.for_strips([&](const Strip& strip)
                     IMAML_INLINE_LAMBDA { channels[strip.index()].set(p, strip); });
  all.template reduce<5>(
      [&](const Strip& strip, const Chunk<T>& chunk, Sums<5, T>& sums, auto zero)
          IMAML_INLINE_LAMBDA {
            const NormChannel<V> channel = channels[strip.index()].get();
            decltype(zero) part[5] = {};
            chunk.sum(part, [&](const auto& e, const auto& add) IMAML_INLINE_LAMBDA {
              const V x = e.of(p.x), g = channel.template relu_grad<kRelu>(x, e.of(p.g));
              norm_double_terms<decltype(zero)>(channel.h(x), g, e.of(p.a), add);
            });
            sums.add(part);
          },
      [&](const Strip& strip, auto& means) IMAML_INLINE_LAMBDA {
        for (int64_t lane = 0; lane < strip.width; ++lane) {
          const double mean[] = {means[0][lane], means[1][lane], means[2][lane], means[3][lane],
                                 means[4][lane]};
          coefficients[strip.index()].set(lane, norm_coefficients(p, strip.coord(lane), mean));
          p.grad_gamma[strip.channel + lane] = norm_grad_gamma(p, strip.channel + lane, mean);
        }
      });
  all.for_chunks([&](const Strip& strip, const Chunk<T>& chunk) IMAML_INLINE_LAMBDA {
    const NormChannel<V> channel = channels[strip.index()].get();
    const NormCoefficients<V> c = coefficients[strip.index()].get();
    chunk.for_rows([&](const auto& e) IMAML_INLINE_LAMBDA {
      const V x = e.of(p.x), a = e.of(p.a), h = channel.h(x);
      e.set(p.grad_g, channel.template relu_grad<kRelu>(x, c.grad_g(channel, h, a)));
      e.set(p.grad_x, c.grad_x(h, channel.template relu_grad<kRelu>(x, e.of(p.g)), a));
    });
  });
}

template <typename Pass, typename T>
IMAML_INLINE void run_on(const Pass& pass, const TaskStrips<T>& all) {
  includes_relu(pass) ? run<true>(pass, all) : run<false>(pass, all);
}

}  // namespace

#define IMAML_DEFINE(Pass, T)                                                             \
  IMAML_MULTIVERSION void norm_blocks(const Pass<T>& pass, int64_t task, Blocks blocks) { \
    run_on(pass, TaskStrips<T>(pass.shape, task, blocks));                                \
  }
IMAML_DEFINE(NormForward, float)
IMAML_DEFINE(NormForward, double)
IMAML_DEFINE(NormBackward, float)
IMAML_DEFINE(NormBackward, double)
IMAML_DEFINE(NormDoubleBackward, float)
IMAML_DEFINE(NormDoubleBackward, double)
#undef IMAML_DEFINE

}  // namespace cpu
}  // namespace imaml
