// Tensors whose memory is used again. A batch is megabytes that live for a step: given back to the system each time, every
// page of it costs a page fault, about a tenth of the loader's time.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

namespace gaitfast {

// Uninitialised uint8 memory, the caller's own until its last reference goes; then the next tensor of that size may have
// it. At most kSpare tensors are kept for later.
at::Tensor recycled_bytes(at::IntArrayRef shape);

}  // namespace gaitfast
