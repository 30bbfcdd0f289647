// The sizes of clusters, and what can be told of them without CUDA.
#pragma once

namespace imaml::cuda {

constexpr int kClusterSizes = 5;  // 1, 2, 4, 8, 16 blocks
constexpr int kMaxCluster = 1 << (kClusterSizes - 1);
constexpr int kPortableCluster = 8;  // any device that has clusters has these

struct CgOccupancy {
  int blocks;                         // of a row; 0: three launches
  int rows_at_a_time[kClusterSizes];  // [k]: that the device works on, in 2^k blocks each
};

}  // namespace imaml::cuda
