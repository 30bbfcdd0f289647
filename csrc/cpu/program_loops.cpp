// Fewer and longer loops: a loop of size 1 is dropped, and two loops that all operands traverse
// with one stride are merged.
#include <algorithm>
#include <numeric>

#include "cpu/program_call.h"

namespace imaml::cpu {
namespace {

void erase_loop(Call& call, int loop) {
  --call.loops;
  for (int k = loop; k < call.loops; ++k) {
    call.size[k] = call.size[k + 1];
    for (Place& place : call.places) place.stride[k] = place.stride[k + 1];
  }
}

bool mergeable(const Call& call, int loop) {
  return std::all_of(call.places.begin(), call.places.end(), [&](const Place& place) {
    return place.stride[loop + 1] == place.stride[loop] * call.size[loop];
  });
}

}  // namespace

void drop_unit_loops(Call& call, int first) {
  for (int k = call.loops - 1; k >= first; --k)
    if (call.size[k] == 1) erase_loop(call, k);
}

void merge_loops(Call& call, int first) {
  for (int k = first; k + 1 < call.loops;) {
    if (!mergeable(call, k)) {
      ++k;
      continue;
    }
    const int64_t size = call.size[k] * call.size[k + 1];
    erase_loop(call, k + 1);
    call.size[k] = size;
  }
}

void add_unit_loop(Call& call) {
  call.loops = 1;
  call.size[0] = 1;
  for (Place& place : call.places) place.stride[0] = 1;  // as of a contiguous array
}

void reorder_loops(Call& call, const std::vector<int>& order) {
  const Call old = call;
  for (std::size_t k = 0; k < order.size(); ++k) {
    call.size[k] = old.size[order[k]];
    for (std::size_t o = 0; o < call.places.size(); ++o)
      call.places[o].stride[k] = old.places[o].stride[order[k]];
  }
}

std::vector<int> by_stride(const Call& call, std::size_t operand) {
  std::vector<int> order(static_cast<std::size_t>(call.loops));
  std::iota(order.begin(), order.end(), 0);
  const int64_t* stride = call.places[operand].stride;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return stride[a] < stride[b]; });
  return order;
}

}  // namespace imaml::cpu
