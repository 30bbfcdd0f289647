// The layers of conv.h and batch_norm.h, for one task:
//
//   conv                  y | x, w, optionally bias
//   conv_data_gradient    dx | g, w
//   conv_weight_gradient  dw | x, g
//     integers: images, in_h, in_w, channels, out_h, out_w, filters, kernel_h, kernel_w, stride_h,
//     stride_w, pad_h, pad_w
//   batch_norm            y, positive, mean, scale | x, gamma, beta
//   batch_norm_backward   dx, dgamma, dbeta | g, x, gamma, beta, mean, scale
//   batch_norm_double_backward
//                         grad_g, grad_x, grad_gamma | a, b, c, g, x, gamma, beta, mean, scale
//     integers: rows, channels, relu; batch_norm has eps as its scalar
//
// Results are before the bar. All arrays are contiguous, and the instructions have no loops.
#include <algorithm>
#include <array>
#include <stdexcept>

#include "cpu/batch_norm.h"
#include "cpu/conv.h"
#include "cpu/program_call.h"

namespace imaml::cpu {
namespace {

constexpr std::size_t kConvIntegers = 13, kNormIntegers = 3;

enum class Layer {
  kNone,
  kConv,
  kConvData,
  kConvWeight,
  kNorm,
  kNormBackward,
  kNormDoubleBackward
};

Layer layer_of(const std::string& name) {
  if (name == "conv") return Layer::kConv;
  if (name == "conv_data_gradient") return Layer::kConvData;
  if (name == "conv_weight_gradient") return Layer::kConvWeight;
  if (name == "batch_norm") return Layer::kNorm;
  if (name == "batch_norm_backward") return Layer::kNormBackward;
  if (name == "batch_norm_double_backward") return Layer::kNormDoubleBackward;
  return Layer::kNone;
}

bool is_conv(Layer layer) { return layer >= Layer::kConv && layer <= Layer::kConvWeight; }

void check(const std::string& name, const std::vector<int64_t>& integers) {
  for (const int64_t value : integers)
    if (value < 0 || value >= int64_t{1} << 31)
      throw std::invalid_argument(name + ": integers must be in [0, 2^31), got " +
                                  std::to_string(value));
}

ConvShape conv_shape(const std::vector<int64_t>& n) {
  ConvShape s{.tasks = 1,
              .images = n[0],
              .in_h = n[1],
              .in_w = n[2],
              .channels = n[3],
              .out_h = n[4],
              .out_w = n[5],
              .filters = n[6],
              .kernel_h = n[7],
              .kernel_w = n[8],
              .stride_h = n[9],
              .stride_w = n[10],
              .pad_h = n[11],
              .pad_w = n[12],
              .task_stride = 0};
  const auto fits = [](int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad) {
    const int64_t room = in + 2 * pad - kernel;
    return in > 0 && kernel > 0 && stride > 0 && room >= 0 && out == room / stride + 1;
  };
  if (s.images < 1 || s.channels < 1 || s.filters < 1 ||
      !fits(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.pad_h) ||
      !fits(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.pad_w))
    throw std::invalid_argument("conv: the integers are not those of a convolution");
  s.task_stride = s.weights();
  return s;
}

template <typename Plan>
struct ConvPlan {
  ConvShape shape;
  Plan plan;
};

template <typename Plan>
const ConvPlan<Plan>& plan_of(const Call& call) {
  return *static_cast<const ConvPlan<Plan>*>(call.plan.get());
}

template <typename T>
void conv_forward(const Call& call, Frame& frame) {
  const auto& [s, map] = plan_of<PixelMap>(call);
  const auto& at = call.places;
  const T* bias = at.size() > 3 ? frame.at<const T>(at[3]) : nullptr;
  conv_blocks(s, map, frame.at<const T>(at[1]), frame.at<const T>(at[2]), bias, frame.at<T>(at[0]),
              0, Blocks{0, tile_blocks<T>(s.filters)});
}

template <typename T>
void conv_data(const Call& call, Frame& frame) {
  const auto& [s, map] = plan_of<PixelMap>(call);
  const auto& at = call.places;
  conv_data_blocks(s, map, frame.at<const T>(at[1]), frame.at<const T>(at[2]), frame.at<T>(at[0]),
                   0, Blocks{0, tile_blocks<T>(s.channels)});
}

template <typename T>
void conv_weight(const Call& call, Frame& frame) {
  const auto& [s, plan] = plan_of<WeightPlan>(call);
  const auto& at = call.places;
  conv_weight_blocks(s, plan, frame.at<const T>(at[1]), frame.at<const T>(at[2]),
                     frame.at<T>(at[0]), 0, Blocks{0, tile_blocks<T>(s.filters)});
}

NormShape norm_shape(const Call& call) { return {1, call.integers[0], call.integers[1]}; }

Blocks norm_range(const NormShape& shape) {
  return {0, (shape.channels + kNormLanes - 1) / kNormLanes};
}

template <typename T>
TaskChannels<T> channels_at(const Frame& frame, const Place& place) {
  return {frame.at<const T>(place), 0};
}

template <typename T>
NormOperands<T> norm_operands(const Call& call, const Frame& frame, std::size_t first) {
  const Place* at = call.places.data() + first;
  return {norm_shape(call),         call.integers[2] != 0,        frame.at<const T>(at[0]),
          frame.at<const T>(at[1]), channels_at<T>(frame, at[2]), channels_at<T>(frame, at[3]),
          frame.at<const T>(at[4]), frame.at<const T>(at[5])};
}

template <typename T>
void norm_forward(const Call& call, Frame& frame) {
  const auto& at = call.places;
  const NormForward<T> pass{norm_shape(call),
                            call.scalars[0],
                            frame.at<const T>(at[4]),
                            channels_at<T>(frame, at[5]),
                            channels_at<T>(frame, at[6]),
                            frame.at<T>(at[0]),
                            call.integers[2] != 0 ? frame.at<T>(at[1]) : nullptr,
                            frame.at<T>(at[2]),
                            frame.at<T>(at[3])};
  norm_blocks(pass, 0, norm_range(pass.shape));
}

template <typename T>
void norm_backward(const Call& call, Frame& frame) {
  const auto& at = call.places;
  const NormBackward<T> pass{norm_operands<T>(call, frame, 3), frame.at<T>(at[0]),
                             frame.at<T>(at[1]), frame.at<T>(at[2])};
  norm_blocks(pass, 0, norm_range(pass.shape));
}

template <typename T>
void norm_double_backward(const Call& call, Frame& frame) {
  const auto& at = call.places;
  const NormDoubleBackward<T> pass{norm_operands<T>(call, frame, 6),
                                   frame.at<const T>(at[3]),
                                   channels_at<T>(frame, at[4]),
                                   channels_at<T>(frame, at[5]),
                                   frame.at<T>(at[0]),
                                   frame.at<T>(at[1]),
                                   frame.at<T>(at[2])};
  norm_blocks(pass, 0, norm_range(pass.shape));
}

template <typename T>
void prepare_conv(Layer layer, Call& call) {
  const ConvShape s = conv_shape(call.integers);
  if (layer == Layer::kConv)
    call.plan = std::make_shared<ConvPlan<PixelMap>>(s, output_pixels(s));
  else if (layer == Layer::kConvData)
    call.plan = std::make_shared<ConvPlan<PixelMap>>(s, input_pixels(s));
  else
    call.plan = std::make_shared<ConvPlan<WeightPlan>>(s, weight_plan(s, kTileLanes<T>));
}

template <typename T>
Kernel kernel_of(Layer layer) {
  switch (layer) {
    case Layer::kConv:
      return conv_forward<T>;
    case Layer::kConvData:
      return conv_data<T>;
    case Layer::kConvWeight:
      return conv_weight<T>;
    case Layer::kNorm:
      return norm_forward<T>;
    case Layer::kNormBackward:
      return norm_backward<T>;
    default:
      return norm_double_backward<T>;
  }
}

template <typename T>
void prepare(const std::string& name, Call& call) {
  const Layer layer = layer_of(name);
  check(name, call.integers);
  if (is_conv(layer)) prepare_conv<T>(layer, call);
  call.kernel = kernel_of<T>(layer);
}

}  // namespace

Prepare find_layer(const std::string& name, Signature& signature) {
  switch (layer_of(name)) {
    case Layer::kNone:
      return nullptr;
    case Layer::kConv:
      signature = {.operands = 3, .more_operands = 1, .integers = kConvIntegers};
      break;
    case Layer::kConvData:
    case Layer::kConvWeight:
      signature = {.operands = 3, .integers = kConvIntegers};
      break;
    case Layer::kNorm:
      signature = {.operands = 7, .integers = kNormIntegers, .scalars = 1, .results = 4};
      break;
    case Layer::kNormBackward:
      signature = {.operands = 9, .integers = kNormIntegers, .results = 3};
      break;
    case Layer::kNormDoubleBackward:
      signature = {.operands = 12, .integers = kNormIntegers, .results = 3};
      break;
  }
  return [](const std::string& what, const Types& types, Call& call) {
    types.result == DType::kFloat32 ? prepare<float>(what, call) : prepare<double>(what, call);
  };
}

int64_t layer_elements(const Instruction& one, std::size_t operand) {
  const Layer layer = layer_of(one.name);
  if (layer == Layer::kNone) return -1;
  check(one.name, one.integers);
  if (is_conv(layer)) {
    const ConvShape s = conv_shape(one.integers);
    const int64_t in = s.images * s.image_size(), weights = s.weights();
    const int64_t out = s.images * s.out_pixels() * s.filters;
    if (layer == Layer::kConv) return std::array{out, in, weights, s.filters}[operand];
    return layer == Layer::kConvData ? std::array{in, out, weights}[operand]
                                     : std::array{weights, in, out}[operand];
  }
  const int64_t channels = one.integers[1], images = one.integers[0] * channels;
  // Which operands are images; the others have an element per channel.
  const std::size_t positive = 1;
  if (layer == Layer::kNorm) {
    if (operand == positive && one.integers[2] == 0) return 0;
    return operand == 0 || operand == positive || operand == 4 ? images : channels;
  }
  if (layer == Layer::kNormBackward)
    return operand == 0 || operand == 3 || operand == 4 ? images : channels;
  return operand <= 1 || operand == 3 || operand == 6 || operand == 7 ? images : channels;
}

double layer_work(const Instruction& one) {
  const Layer layer = layer_of(one.name);
  if (layer == Layer::kNone) return 0;
  if (!is_conv(layer)) return 4.0 * static_cast<double>(one.integers[0] * one.integers[1]);
  const ConvShape s = conv_shape(one.integers);
  return static_cast<double>(s.images * s.out_pixels()) * static_cast<double>(s.weights());
}

}  // namespace imaml::cpu
