// What bench/environment.py asks for through ctypes.
#include "../scratch.h"

// The most bytes that kernels held at once since the last call, and counts anew.
extern "C" [[gnu::visibility("default")]] int64_t orthonorm_scratch() {
  const int64_t most = orthonorm::scratch_count.most();
  orthonorm::scratch_count.restart();
  return most;
}
