// Python's interface to programs. An instruction is a tuple (name, sizes, operands, integers,
// scalars), an operand a tuple (slot, offset, strides); see cpu/program.h. Buffers are passed as
// addresses, so that a call costs no more than the conversion of a few integers; that they are
// valid and large enough (`extents`) is the caller's responsibility.
//
// `descend` and `conjugate_gradient` repeat a program together with a kernel of rows.h, task by
// task. The buffers of descend are those of ProxArgs (phi, grad, theta, lam, velocity or 0), those
// of conjugate_gradient b, x, r, p, hp, lam, rr, status, steps, count, curvature, beta, diagonal,
// link, norm and tol2 of CgSolve. It returns whether all tasks are plain.
#include "bindings/program.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <tuple>

#include "bindings/parallel.h"
#include "cpu/cg_solve.h"
#include "cpu/program.h"
#include "cpu/rows.h"

namespace imaml {
namespace {

using std::int64_t;

using OperandTuple = std::tuple<int64_t, int64_t, std::vector<int64_t>>;
using InstructionTuple = std::tuple<std::string, std::vector<int64_t>, std::vector<OperandTuple>,
                                    std::vector<int64_t>, std::vector<double>>;

cpu::DType dtype(const std::string& name) {
  if (name == "float32") return cpu::DType::kFloat32;
  if (name == "float64") return cpu::DType::kFloat64;
  if (name == "int64") return cpu::DType::kInt64;
  if (name == "int32") return cpu::DType::kInt32;
  if (name == "uint8") return cpu::DType::kUint8;
  throw std::invalid_argument("a dtype must be float32, float64, int64, int32 or uint8, got '" +
                              name + "'");
}

std::unique_ptr<cpu::Program> new_program(const std::string& type, int64_t arena,
                                          const std::vector<double>& constants,
                                          const std::vector<std::string>& slots,
                                          const std::vector<InstructionTuple>& instructions) {
  std::vector<cpu::DType> types;
  for (const std::string& one : slots) types.push_back(dtype(one));
  std::vector<cpu::Instruction> list;
  for (const auto& [name, sizes, operands, integers, scalars] : instructions) {
    list.push_back({name, sizes, {}, integers, scalars});
    for (const auto& [slot, offset, strides] : operands)
      list.back().operands.push_back({slot, offset, strides});
  }
  return std::make_unique<cpu::Program>(dtype(type), arena, constants, types, list);
}

constexpr auto parallel_for = [](int64_t n, int64_t grain, const auto& body) {
  using Body = std::remove_reference_t<decltype(body)>;
  run_in_parallel(
      n, grain,
      [](const void* context, int64_t first, int64_t last) {
        (*static_cast<const Body*>(context))(first, last);
      },
      &body);
};

using Address = std::uintptr_t;

void repeat(const cpu::Program& program, int64_t times, int64_t tasks,
            const std::vector<Address>& pointers, const std::vector<int64_t>& strides,
            const cpu::After& after) {
  std::vector<void*> buffers;
  for (const Address one : pointers) buffers.push_back(reinterpret_cast<void*>(one));
  if (!program.repeat(times, tasks, buffers, strides, parallel_for, after))
    throw std::out_of_range("an index of gather or scatter is out of range");
}

void run(const cpu::Program& program, int64_t tasks, const std::vector<Address>& pointers,
         const std::vector<int64_t>& strides) {
  repeat(program, 1, tasks, pointers, strides, [](int64_t, int64_t) { return true; });
}

// A buffer of an array of addresses.
template <typename T>
T* at(const std::vector<Address>& buffers, std::size_t index) {
  return reinterpret_cast<T*>(buffers.at(index));
}

template <typename T>
void descend_as(const cpu::Program& program, int64_t steps, int64_t tasks,
                const std::vector<Address>& pointers, const std::vector<int64_t>& strides,
                const std::vector<Address>& buffers, int64_t dim, int64_t lam_stride, double lr,
                double momentum, bool nesterov) {
  const ProxArgs<T> args{at<T>(buffers, 0),
                         at<const T>(buffers, 1),
                         at<const T>(buffers, 2),
                         at<const T>(buffers, 3),
                         lam_stride,
                         /*status=*/nullptr,
                         tasks,
                         dim};
  const Descent<T> rule{at<T>(buffers, 4), static_cast<T>(lr), static_cast<T>(momentum), nesterov};
  repeat(program, steps, tasks, pointers, strides, [&](int64_t task, int64_t) {
    cpu::prox_step_row(args, rule, task, cpu::Serial{});
    return true;
  });
}

template <typename T>
bool solve_as(const cpu::Program& program, int64_t iterations, int64_t tasks,
              const std::vector<Address>& pointers, const std::vector<int64_t>& strides,
              const std::vector<Address>& buffers, int64_t dim, int64_t lam_stride, double damping,
              double rtol, double atol) {
  auto* const tol2 = at<double>(buffers, 15);
  const cpu::CgSolve<T> solve{.b = at<const T>(buffers, 0),
                              .step = {.x = at<T>(buffers, 1),
                                       .r = at<T>(buffers, 2),
                                       .p = at<T>(buffers, 3),
                                       .hp = at<const T>(buffers, 4),
                                       .lam = at<const T>(buffers, 5),
                                       .lam_stride = lam_stride,
                                       .damping = static_cast<T>(damping),
                                       .inverse = nullptr,
                                       .rr = at<double>(buffers, 6),
                                       .rz = nullptr,
                                       .tol2 = tol2,
                                       .status = at<std::int32_t>(buffers, 7),
                                       .steps = at<std::int32_t>(buffers, 8),
                                       .curvature = at<double>(buffers, 10),
                                       .beta = at<double>(buffers, 11),
                                       .rows = tasks,
                                       .dim = dim},
                              .rtol = rtol,
                              .atol = atol,
                              .iterations = iterations,
                              .diagonal = at<double>(buffers, 12),
                              .link = at<double>(buffers, 13),
                              .count = at<std::int32_t>(buffers, 9),
                              .norm = at<double>(buffers, 14),
                              .tol2 = tol2};
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(dim, 1));
  parallel_for(tasks, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) solve.begin(task);
  });
  std::atomic<bool> plain{true};
  repeat(program, iterations, tasks, pointers, strides, [&](int64_t task, int64_t k) {
    const bool running = solve.advance(task, k) && k + 1 < iterations;
    if (!running && !solve.end(task)) plain = false;
    return running;
  });
  return plain;
}

template <typename... Args>
void descend(const cpu::Program& program, Args... args) {
  program.type() == cpu::DType::kFloat32 ? descend_as<float>(program, args...)
                                         : descend_as<double>(program, args...);
}

template <typename... Args>
bool solve(const cpu::Program& program, Args... args) {
  return program.type() == cpu::DType::kFloat32 ? solve_as<float>(program, args...)
                                                : solve_as<double>(program, args...);
}

}  // namespace

void define_program(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<cpu::Program>(m, "Program")
      .def(py::init(&new_program), py::arg("dtype"), py::arg("arena"), py::arg("constants"),
           py::arg("slots"), py::arg("instructions"))
      .def_property_readonly("extents", &cpu::Program::extents)
      .def("run", &run, py::arg("tasks"), py::arg("pointers"), py::arg("strides"),
           py::call_guard<py::gil_scoped_release>())
      .def("descend",
           &descend<int64_t, int64_t, const std::vector<Address>&, const std::vector<int64_t>&,
                    const std::vector<Address>&, int64_t, int64_t, double, double, bool>,
           py::arg("steps"), py::arg("tasks"), py::arg("pointers"), py::arg("strides"),
           py::arg("buffers"), py::arg("dim"), py::arg("lam_stride"), py::arg("lr"),
           py::arg("momentum"), py::arg("nesterov"), py::call_guard<py::gil_scoped_release>())
      .def("conjugate_gradient",
           &solve<int64_t, int64_t, const std::vector<Address>&, const std::vector<int64_t>&,
                  const std::vector<Address>&, int64_t, int64_t, double, double, double>,
           py::arg("iterations"), py::arg("tasks"), py::arg("pointers"), py::arg("strides"),
           py::arg("buffers"), py::arg("dim"), py::arg("lam_stride"), py::arg("damping"),
           py::arg("rtol"), py::arg("atol"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace imaml
