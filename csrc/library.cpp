// The one schema of torch.ops.gaitfast. Implementations register themselves per device (cpu/, cuda/).
#include <Python.h>
#include <torch/library.h>

extern "C" PyObject* PyInit__C() {
  // Importing gaitfast._C only loads the shared library; the operators register when it is loaded.
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

TORCH_LIBRARY(gaitfast, m) {
  // LZ4 blocks -> frames. bytes: uint8 (any), offset/size: int64 (n) into bytes; row i of out: the i-th block inflated.
  m.def("inflate_frames(Tensor bytes, Tensor offset, Tensor size, int frame_bytes) -> Tensor");
  // The CRC-32 of each block as int64 (n); -1 where a block leaves `bytes`.
  m.def("chunk_crc32(Tensor bytes, Tensor offset, Tensor size) -> Tensor");
  // Dilation, then blur and threshold, of rows [first, last) of each clip (B, T, H, W), in place.
  m.def("part_ops_(Tensor(a!) clips, Tensor half_widths, Tensor dilate_rows, Tensor blur_rows) -> ()");
}
