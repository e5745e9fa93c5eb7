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
  // Frames uint8 (n, 4096) -> LZ4 blocks back to back uint8 (any), their sizes int64 (n) and CRC-32 int64 (n).
  m.def("compress_frames(Tensor frames) -> (Tensor bytes, Tensor sizes, Tensor crc)");
  // Frames numbers[i] of shards[i], each shard mapped: data uint8, offsets int64 (frames + 1), crc int32 (frames), whose
  // bits are those of uint32. problem int64 (2): the first bad row or -1, and what is wrong with it (csrc/cpu/shards.cpp).
  m.def(
      "read_frames(Tensor[] data, Tensor[] offsets, Tensor[] crc, Tensor shards, Tensor numbers, int frame_bytes) -> "
      "(Tensor frames, Tensor problem)");
  // Their blocks as they are, back to back, and the sizes int64 (n).
  m.def(
      "read_chunks(Tensor[] data, Tensor[] offsets, Tensor[] crc, Tensor shards, Tensor numbers) -> "
      "(Tensor bytes, Tensor sizes, Tensor problem)");
  // The same frames, n = B T of them, as clips: augmented (gaitfast/data/augment.py) to uint8 (B, T, 64, width) on `threads`
  // threads. matrix: float64 (B, 3, 3); warp, flip: bool (B); the others as in part_ops_.
  m.def(
      "augment_clips(Tensor[] data, Tensor[] offsets, Tensor[] crc, Tensor shards, Tensor numbers, int width, "
      "Tensor matrix, Tensor warp, Tensor flip, Tensor half_widths, Tensor dilate_rows, Tensor blur_rows, int threads)"
      " -> (Tensor clips, Tensor problem)");
  // Philox words as int64 (n, count): gaitfast/randomness.py, bits.
  m.def("philox_bits(int key0, int key1, int step, Tensor sample, int count) -> Tensor");
  // int64 (n, count): gaitfast/data/sampling.py, unordered_frames.
  m.def(
      "unordered_frames(int key0, int key1, int step, Tensor sample, Tensor length, Tensor meant, int count) -> Tensor");
  // Dilation, then blur and threshold, of rows [first, last) of each clip (B, T, H, W), in place.
  m.def("part_ops_(Tensor(a!) clips, Tensor half_widths, Tensor dilate_rows, Tensor blur_rows) -> ()");

  // Between the convolutions of a plain stack (gaitfast/models/stack.py), CPU. Maps (F, C, H, W), channels_last, float32
  // or bfloat16. LeakyReLU of the maxima of 2 x 2 windows, and which entry won (uint8, the first of equal ones).
  m.def("pool_leaky(Tensor x, float slope) -> (Tensor, Tensor)");
  m.def("pool_leaky_backward(Tensor gradient, Tensor out, Tensor code, int height, int width, float slope) -> Tensor");
  // The gradient before a LeakyReLU whose result is `out`, in place.
  m.def("leaky_backward_(Tensor(a!) gradient, Tensor out, float slope) -> ()");
  // Maxima over the frames of clips (N, S, M), at most 256, and which frame won: (N, M), uint8 (N, M); and back.
  m.def("frames_max(Tensor x) -> (Tensor, Tensor)");
  m.def("frames_max_backward(Tensor gradient, Tensor which, int frames) -> Tensor");
  // Batch norm of a training batch x (F, C, H, W), its shortcut added, ReLU (gaitfast/models/frame_norm.py): the result,
  // channels_last, and each channel's mean and biased variance, float64 (2, C).
  m.def("frame_norm(Tensor x, Tensor weight, Tensor bias, Tensor? shortcut, bool relu, float eps) -> (Tensor, Tensor)");
  // out: the result of a norm with a shortcut and ReLU. Gradients of x, of weight and bias float32 (2, C), and with `out`
  // of the shortcut, empty without.
  m.def(
      "frame_norm_backward(Tensor gradient, Tensor x, Tensor weight, Tensor bias, Tensor moments, Tensor? out, bool relu, "
      "float eps) -> (Tensor, Tensor, Tensor)");
  // Products of the denoiser on the CPU (kernels/convolution.py), bfloat16, channels last.
  // Whether weight_gradient runs here.
  m.def("has_row_products() -> bool", &gaitfast::convolution::has_row_products);
  // left (F, H, W, M), right (F, H', W', N) -> float32: the sum over sites of left times right's patches
  // (M, N, kernel, kernel), and the sum of left (M).
  m.def("weight_gradient(Tensor left, Tensor right, int kernel, int stride, int padding) -> (Tensor, Tensor)");
  // (M, N, kernel, kernel) -> bfloat16 (sites' * M, height * width * N): the convolution of one frame as a matrix.
  m.def("dense_weight(Tensor weight, int height, int width, int stride, int padding) -> Tensor");

  // Exact retrieval (gaitfast/retrieval). Features (N, C, P), float32, float16 or bfloat16, one type on both sides.
  // Sums of squares per part, float64 (N, P).
  m.def("part_squares(Tensor features) -> Tensor");
  // What the next gallery_plane on the CPU will be of: int8 (two planes, for AMX), int16 (AVX-512 VNNI) or float32.
  m.def("plane_type() -> str", &gaitfast::retrieval::plane_type);
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

  // Which instructions the denoiser's operations use: generic, avx2, avx512 or amx.
  m.def("denoiser_instructions() -> str", &gaitfast::denoiser::instructions);
  // The denoiser's operations (gaitfast.kernels says what they compute), float32 or bfloat16. The second result: mean and
  // 1 / deviation of each group, float32 (B, 2, G).
  m.def(
      "group_norm_film_silu(Tensor x, Tensor weight, Tensor bias, int groups, Tensor? scale, Tensor? shift, float eps) -> "
      "(Tensor, Tensor)");
  m.def(
      "group_norm_film_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, int groups, Tensor? scale, "
      "Tensor? shift, Tensor stats) -> (Tensor, Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("layer_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("temporal_attention(Tensor qkv, Tensor bias, Tensor rotation, int heads) -> Tensor");
  m.def(
      "temporal_attention_backward(Tensor grad, Tensor qkv, Tensor bias, Tensor rotation, int heads) -> (Tensor, Tensor)");
  m.def("spatial_attention(Tensor qkv, int heads) -> Tensor");
  m.def("spatial_attention_backward(Tensor grad, Tensor qkv, int heads) -> Tensor");
  m.def("linear_attention(Tensor qkv, int heads) -> Tensor");
  m.def("linear_attention_backward(Tensor grad, Tensor qkv, int heads) -> Tensor");
  m.def("film(Tensor time, Tensor condition, Tensor weight, Tensor bias) -> Tensor");
}
