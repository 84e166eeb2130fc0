// Intel's AMX: 16 x 16 sums in float of 32 products of bfloat16 each, an instruction; torch-free.
//
// A tile is 16 lines of 64 bytes. A left tile's line is a row of the matrix, 32 neighbours along
// the depth; a right tile's line is 16 columns of one pair along the depth.
#pragma once

#include <cstdint>

#include "isa.h"

namespace orthonorm::amx {

#if ORTHONORM_HAS_AMX

// The calling thread's tiles, all eight of full size; afterwards they are as others left them.
class Tiles {
 public:
  Tiles() { exchange(); }
  ~Tiles() { restore(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  // In assembly: GCC's intrinsics read eight bytes of the configuration only, to the optimizer.
  ORTHONORM_AMX [[gnu::noinline]] void exchange() {
    const Config full;
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" ::"m"(full));
  }
  ORTHONORM_AMX [[gnu::noinline]] void restore() {
    if (before_.palette == 0) {
      asm volatile("tilerelease");
    } else {
      asm volatile("ldtilecfg %0" ::"m"(before_));
    }
  }
  Config before_;
};

#else

struct Tiles {};

#endif

}  // namespace orthonorm::amx
