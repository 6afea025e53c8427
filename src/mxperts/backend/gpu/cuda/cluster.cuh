// Blocks that run together and reach each other's shared memory, from compute capability 9.0 on.
//
//   CLUSTER     their number; 1 on any device
#pragma once
#include "common.cuh"

#if CLUSTER == 1
DI int rank_in_cluster() { return 0; }
DI void wait_for_cluster() { __syncthreads(); }
DI int load_of_cluster(const int* own, int) { return *own; }
#else
DI int rank_in_cluster() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DI void wait_for_cluster() { asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory"); }
// A number in the shared memory of another block of the cluster, at the same place as here.
DI int load_of_cluster(const int* own, int rank) {
  int v;
  asm volatile("{.reg .b32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.b32 %0, [a];}"
               : "=r"(v) : "r"(shared_address(own)), "r"(rank) : "memory");
  return v;
}
#endif
