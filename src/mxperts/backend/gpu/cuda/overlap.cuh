// A launch that starts while the one before it ends, from compute capability 9.0 on; what it needs of that it waits for.
#pragma once
#include "common.cuh"

DI void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DI void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
