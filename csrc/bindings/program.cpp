// Python's interface to programs. An instruction is a tuple (name, sizes, operands, integers,
// scalars), an operand a tuple (slot, offset, strides); see cpu/program.h. Buffers are passed as
// addresses, so that a call costs no more than the conversion of a few integers; that they are
// valid and large enough (`extents`) is the caller's responsibility.
#include "bindings/program.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include "bindings/parallel.h"
#include "cpu/program.h"

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

void run(const cpu::Program& program, int64_t tasks, const std::vector<std::uintptr_t>& pointers,
         const std::vector<int64_t>& strides) {
  std::vector<void*> buffers;
  for (const std::uintptr_t one : pointers) buffers.push_back(reinterpret_cast<void*>(one));
  if (!program.run(tasks, buffers, strides, parallel_for))
    throw std::out_of_range("an index of gather or scatter is out of range");
}

}  // namespace

void define_program(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<cpu::Program>(m, "Program")
      .def(py::init(&new_program), py::arg("dtype"), py::arg("arena"), py::arg("constants"),
           py::arg("slots"), py::arg("instructions"))
      .def_property_readonly("extents", &cpu::Program::extents)
      .def("run", &run, py::arg("tasks"), py::arg("pointers"), py::arg("strides"),
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace imaml
