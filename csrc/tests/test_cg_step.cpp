// cg_step: every outcome of an iteration, and complete solves.
#include <map>

#include "cg_oracle.h"

namespace imaml {
namespace {

// On the device that shim::device describes, in all orders of the threads or in three.
template <typename T>
CgState<T> test_on_device(const CgState<T>& before, bool in_every_order) {
  const std::string outer = context;
  CgState<T> first = before;
  std::vector<shim::Order> orders = {shim::Order::kForwards, shim::Order::kWarpByWarp,
                                     shim::Order::kLastWarpFirst};
  if (in_every_order)
    orders.insert(orders.end(), {shim::Order::kBackwards, shim::Order::kShuffled});
  for (auto order : orders) {
    shim::order = order;
    const CgState<T> state = cuda_step(before);
    context = outer + ", order " + std::to_string(static_cast<int>(order));
    if (order == shim::Order::kForwards) {
      check_cg(before, state);
      first = state;
    } else {
      expect(state.same(first), "the order of threads changes the bits: a race");
    }
  }
  context = outer;
  return first;
}

template <typename T>
void test_cg(int64_t rows, int64_t dim, bool diagonal, bool preconditioned) {
  const std::string name = name_of<T>("cg_step", rows, dim) + (diagonal ? " diagonal" : "") +
                           (preconditioned ? " preconditioned" : "");
  const CgState<T> before(rows, dim, diagonal, preconditioned);
  CgState<T> serial = cpu_step(before), identity = before;
  context = name + " cpu";
  check_cg(before, serial);
  for (int threads : {2, 3, 8}) {
    context = name + " cpu, threads " + std::to_string(threads);
    expect(cpu_step(before, threads, Threads{threads}).same(serial),
           "the number of threads changes the bits");
  }
  if (!preconditioned) {
    identity.inverse.assign(before.x.size(), T(1));
    identity.rz = identity.rr;
    serial.rz = serial.rr;
    expect(cpu_step(identity).same(serial), "M = I differs from no preconditioner, cpu");
  }
  std::map<int, CgState<T>> tested;  // by number of blocks
  for (const shim::Device& device : kDevices) {
    // Short rows take one block, except on the device on which no row fits.
    const int blocks = form_on<T>(device, rows, dim).blocks;
    if (tested.count(blocks) > 0 || (blocks == 0 && dim < 4095)) continue;
    context = name + " cuda, blocks " + std::to_string(blocks);
    // All orders for long rows would take too long, except for a single row.
    CgState<T> state = test_on_device(before, /*in_every_order=*/dim <= 4096 || rows == 1);
    tested.emplace(blocks, state);
    for (const auto& [others, other] : tested)
      if (blocks > 0 && others > 0)
        expect(state.same(other), "the number of blocks changes the bits");
    if (preconditioned) continue;
    state.rz = state.rr;
    expect(cuda_step(identity).same(state), "M = I differs from no preconditioner, cuda");
  }
}

// A row is divided among as many blocks as its length justifies, among fewer if those cannot run at
// the same time, and takes three launches if the device cannot hold it.
void test_forms() {
  const auto expect_blocks = [](int64_t rows, int64_t dim, std::array<int, 5> floats,
                                std::array<int, 5> doubles) {
    for (std::size_t k = 0; k < 5; ++k) {
      context = "cg_form [" + std::to_string(rows) + ", " + std::to_string(dim) + "], device " +
                std::to_string(k);
      expect(form_on<float>(kDevices[k], rows, dim).blocks == floats[k], "floats");
      expect(form_on<double>(kDevices[k], rows, dim).blocks == doubles[k], "doubles");
    }
  };
  expect_blocks(1, 0, {1, 1, 1, 1, 0}, {1, 1, 1, 1, 0});
  expect_blocks(1, 4096, {1, 1, 1, 1, 0}, {1, 1, 1, 1, 0});
  expect_blocks(1, 4097, {2, 2, 2, 1, 0}, {2, 2, 2, 1, 0});
  expect_blocks(1, 8193, {4, 4, 4, 1, 0}, {4, 4, 4, 1, 0});
  expect_blocks(1, 16385, {8, 8, 8, 0, 0}, {8, 8, 8, 0, 0});
  expect_blocks(1, 32769, {16, 16, 8, 0, 0}, {16, 16, 8, 0, 0});
  // Blocks of one share need one wave, two, ...; blocks of two or four shares need fewer.
  expect_blocks(16, 113221, {16, 4, 8, 0, 0}, {16, 8, 8, 0, 0});
  expect_blocks(17, 113221, {8, 4, 8, 0, 0}, {8, 8, 8, 0, 0});
  expect_blocks(33, 113221, {16, 4, 4, 0, 0}, {16, 8, 8, 0, 0});
  expect_blocks(1, 115713, {16, 16, 8, 0, 0}, {16, 16, 0, 0, 0});
  expect_blocks(1, 462848, {16, 16, 0, 0, 0}, {0, 0, 0, 0, 0});
  expect_blocks(1, 462849, {0, 0, 0, 0, 0}, {0, 0, 0, 0, 0});
  context = "fits_grid";
  expect(cuda::fits_grid(2147483647) && !cuda::fits_grid(2147483648), "of 2^31 blocks");
}

// With enough rows that a different order of summation would change the rounding of some.
template <typename T>
void test_the_number_of_blocks_changes_no_bit() {
  for (const bool preconditioned : {false, true}) {
    const CgState<T> before(std::vector<Kind>(16, kHealthy), 2 * 4096 + 1, true, preconditioned, 1);
    std::vector<CgState<T>> states;
    for (std::size_t k = 0; k < 3; ++k) {
      shim::Device device{};
      device.clusters[k] = 16;
      device.shared_bytes[k] = kHopper;
      const int blocks = form_on<T>(device, before.rows, before.dim).blocks;
      context = "cg_step in blocks " + std::to_string(blocks);
      expect(blocks == 1 << k, "blocks");
      shim::order = shim::Order::kForwards;
      states.push_back(cuda_step(before));
      expect(states.back().same(states.front()), "the number of blocks changes the bits");
    }
  }
}

// A row converges by r.r, for any r.z; otherwise it continues only if r.z is positive and finite.
void test_direction() {
  context = "cg_direction";
  const auto status = [](double rr, double rz) {
    return cg_direction({kAdvance, kRunning, 1.0}, {rr, rz}, /*rz_old=*/1.0, /*tol2=*/2.0).status;
  };
  expect(status(1, 100) == kConverged, "r.r is within the tolerance, r.z is not");
  expect(status(3, 0.01) == kRunning, "r.z is within the tolerance, r.r is not");
  for (const double rz : {0.0, -1.0, double{INFINITY}, double{NAN}}) {
    expect(status(3, rz) == kNonfinite, "r.z allows no further step");
    expect(status(1, rz) == kConverged, "r.z is not needed");
  }
}

// Complete solves, without and with the Jacobi preconditioner.
template <typename T>
void test_solve(int64_t dim, bool jacobi) {
  context = "cg solve, dim " + std::to_string(dim) + (jacobi ? " jacobi" : "");
  const int64_t rows = 3;
  std::vector<double> eigenvalues(static_cast<std::size_t>(dim));
  for (int64_t i = 0; i < dim; ++i) eigenvalues[at(i)] = 1 + double(i % 5);
  CgState<T> s(rows, dim, false, false);
  const std::vector<T> b = s.r;
  s.damping = 0;
  s.lam = {T(1)};
  std::fill(s.x.begin(), s.x.end(), T(0));
  s.p = s.r;
  std::fill(s.steps.begin(), s.steps.end(), 0);
  std::fill(s.status.begin(), s.status.end(), std::int32_t{kRunning});
  for (int64_t row = 0; row < rows; ++row) {
    s.rr[at(row)] = cpu::dot(b.data() + row * dim, b.data() + row * dim, 0, dim);
    s.tol2[at(row)] = s.rr[at(row)] * (sizeof(T) == 4 ? 1e-11 : 1e-26);
  }
  if (jacobi) {
    s.rz.assign(at(rows), 0);
    for (int64_t i = 0; i < rows * dim; ++i) {
      s.inverse.push_back(static_cast<T>(1 / (1 + eigenvalues[at(i % dim)])));
      s.p[at(i)] = s.inverse.back() * b[at(i)];
      s.rz[at(i / dim)] += double(b[at(i)]) * double(s.p[at(i)]);
    }
  }
  for (int k = 0; k < 8; ++k) {
    for (int64_t i = 0; i < rows * dim; ++i)
      s.hp[at(i)] = static_cast<T>(eigenvalues[at(i % dim)]) * s.p[at(i)];
    s = cuda_step(s);
  }
  for (int64_t row = 0; row < rows; ++row) {
    expect(s.status[at(row)] == kConverged, "five distinct eigenvalues, not converged");
    if (jacobi) expect(s.steps[at(row)] == 1, "M = A needs more than one step");
  }
  for (int64_t i = 0; i < rows * dim; ++i) {
    const double want = double(b[at(i)]) / (1 + eigenvalues[at(i % dim)]);
    expect(std::abs(double(s.x[at(i)]) - want) < (sizeof(T) == 4 ? 1e-4 : 1e-11), "solution");
  }
}

// 16 blocks, or 8 with shares larger than a thread loads at once.
constexpr int64_t kLargestCluster = 8 * 4096 + 1;

template <typename T>
void test_type() {
  for (int64_t dim : kDims)
    for (int64_t rows : {0, 1, int{kKinds}}) {
      for (bool diagonal : {false, true})
        if (dim > 1 || (dim == 1 && !diagonal)) test_cg<T>(rows, dim, diagonal, false);
      if (dim > 0) test_cg<T>(rows, dim, /*diagonal=*/dim > 1 && dim % 2 == 1, true);
    }
  for (bool preconditioned : {false, true})
    test_cg<T>(1, kLargestCluster, !preconditioned, preconditioned);
  test_cg<T>(1, kManyBlocks, true, /*preconditioned=*/sizeof(T) == 8);  // the slowest case
  test_the_number_of_blocks_changes_no_bit<T>();
  shim::device = kDevices[0];
  for (int64_t dim : {5, 100, 5000})
    for (bool jacobi : {false, true}) test_solve<T>(dim, jacobi);
}

}  // namespace

void test_cg_step() {
  test_direction();
  test_forms();
  test_type<float>();
  test_type<double>();
}

}  // namespace imaml
