// The one schema of torch.ops.gaitfast. Implementations register themselves per device (cpu/, cuda/).
#include <Python.h>
#include <torch/library.h>

#include "ops.h"

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
  // Frames `numbers` int64 (B, T) of a packed dataset, whose shards have `frames` uint8 (any), `offsets` int64 (n + 1) and
  // `sums` uint32 (n), and `first` int64 (shards + 1) numbers their frames: checked, decoded and augmented (augment.py)
  // to uint8 (B, T, 64, width) on `threads` threads. matrix: float64 (B, 3, 3); warp, flip: bool (B).
  m.def(
      "augment_clips(Tensor[] frames, Tensor[] offsets, Tensor[] sums, Tensor first, Tensor numbers, int width, "
      "Tensor matrix, Tensor warp, Tensor flip, Tensor half_widths, Tensor dilate_rows, Tensor blur_rows, int threads)"
      " -> Tensor");
  // The chunks of frames `numbers` int64 (n), checked, back to back, uint8 (sum of sizes), and their sizes, int64 (n).
  m.def(
      "gather_chunks(Tensor[] frames, Tensor[] offsets, Tensor[] sums, Tensor first, Tensor numbers)"
      " -> (Tensor, Tensor)");
  // Dilation, then blur and threshold, of rows [first, last) of each clip (B, T, H, W), in place.
  m.def("part_ops_(Tensor(a!) clips, Tensor half_widths, Tensor dilate_rows, Tensor blur_rows) -> ()");

  // Exact retrieval (gaitfast/retrieval). Features (N, C, P), float32, float16 or bfloat16, one type on both sides.
  // Sums of squares per part, float64 (N, P).
  m.def("part_squares(Tensor features) -> Tensor");
  // Whether the next gallery_plane will be for a tile unit (AMX).
  m.def("uses_tile_unit() -> bool", &gaitfast::retrieval::uses_tile_unit);
  // What products read of a gallery, and how much of each row it leaves out. scale: a power of two, 1 for the cosine.
  m.def("gallery_plane(Tensor features, Tensor squares, str metric, float scale) -> (Tensor plane, Tensor lengths)");
  // The k nearest items, ordered by (exact distance, item): distances float64 (Q, k), items int64 (Q, k); where
  // exclusions leave fewer: infinite and -1. The items excluded for query q: excluded[excluded_offsets[q]:...[q + 1]],
  // ascending.
  m.def(
      "search_gallery(Tensor queries, Tensor query_squares, Tensor gallery, Tensor gallery_squares, Tensor plane, "
      "Tensor lengths, str metric, float scale, int k, Tensor excluded_offsets, Tensor excluded) -> (Tensor, Tensor)");
  // For each positive (n), an item at a distance that is exact or within float64's bound, how many items of this gallery
  // come before it, int64 (n); and open, bool (n): its distance must be exact for that.
  m.def(
      "count_before(Tensor queries, Tensor query_squares, Tensor gallery, Tensor gallery_squares, Tensor plane, "
      "Tensor lengths, str metric, float scale, Tensor offsets, Tensor positives, Tensor distances, Tensor exact, "
      "Tensor excluded_offsets, Tensor excluded) -> (Tensor, Tensor)");
  // Distances of the pairs (rows[i], items[i]), float64 (n): within the bound of float64, or exact.
  m.def(
      "pair_distances(Tensor queries, Tensor query_squares, Tensor gallery, Tensor gallery_squares, Tensor rows, "
      "Tensor items, str metric, bool exact) -> Tensor");
}
