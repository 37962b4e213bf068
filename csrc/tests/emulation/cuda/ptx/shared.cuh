#pragma once

#include "machine.h"

namespace pdiff::cuda {

inline unsigned char* shared_memory() { return emulation::shared_memory(); }

}  // namespace pdiff::cuda
