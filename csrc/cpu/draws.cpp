// The numbers of gaitfast/randomness.py (Philox-4x32-10) and the frames that gaitfast/data/sampling.py draws with them,
// to the bit: NumPy takes a hundred calls for either, and a batch is small.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace gaitfast {
namespace {

constexpr int kLanes = 8;  // blocks that go through the rounds side by side

struct Address {
  uint32_t key0, key1, step_low, step_high;

  Address(int64_t key0, int64_t key1, int64_t step)
      : key0(uint32_t(key0)), key1(uint32_t(key1)), step_low(uint32_t(step)), step_high(uint32_t(step >> 32)) {}
};

// Words of `count` blocks of one sample, numbered from 0: 4 * count at `out`.
template <typename Word>
void philox(const Address& address, uint32_t sample, int64_t count, Word* out) {
  for (int64_t first = 0; first < count; first += kLanes) {
    uint32_t c[4][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      c[0][i] = uint32_t(first + i);
      c[1][i] = sample;
      c[2][i] = address.step_low;
      c[3][i] = address.step_high;
    }
    uint32_t key0 = address.key0, key1 = address.key1;
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
      for (int i = 0; i < kLanes; ++i) {
        const uint64_t a = uint64_t(0xD2511F53) * c[0][i], b = uint64_t(0xCD9E8D57) * c[2][i];
        c[0][i] = uint32_t(b >> 32) ^ c[1][i] ^ key0;
        c[2][i] = uint32_t(a >> 32) ^ c[3][i] ^ key1;
        c[1][i] = uint32_t(b);
        c[3][i] = uint32_t(a);
      }
    }
    const int lanes = int(std::min<int64_t>(kLanes, count - first));
    for (int i = 0; i < lanes; ++i)
      for (int word = 0; word < 4; ++word) out[4 * (first + i) + word] = Word(c[word][i]);
  }
}

void check(const char* op, const at::Tensor& sample, int64_t count) {
  TORCH_CHECK(sample.dim() == 1 && sample.scalar_type() == at::kLong, op, ": sample must be int64 (n)");
  TORCH_CHECK(count >= 0, op, ": count must not be negative, got ", count);
}

at::Tensor philox_bits(int64_t key0, int64_t key1, int64_t step, const at::Tensor& sample, int64_t count) {
  check("philox_bits", sample, count);
  const auto samples = sample.contiguous();
  const int64_t rows = samples.numel(), blocks = (count + 3) / 4;
  auto words = at::empty({rows, 4 * blocks}, at::kLong);
  const Address address(key0, key1, step);
  for (int64_t row = 0; row < rows; ++row)
    philox(address, uint32_t(samples.const_data_ptr<int64_t>()[row]), blocks,
           words.mutable_data_ptr<int64_t>() + row * 4 * blocks);
  return words.narrow(1, 0, count);
}

// Floyd's algorithm, then a random order: see the Python, which is the definition.
at::Tensor unordered_frames(int64_t key0, int64_t key1, int64_t step, const at::Tensor& sample, const at::Tensor& length,
                            const at::Tensor& meant, int64_t count) {
  check("unordered_frames", sample, count);
  for (const auto* tensor : {&length, &meant})
    TORCH_CHECK(tensor->sizes() == sample.sizes() && tensor->scalar_type() == at::kLong,
                "unordered_frames: length and meant must be int64 (n)");
  const auto samples = sample.contiguous(), lengths = length.contiguous(), meants = meant.contiguous();
  const int64_t rows = samples.numel(), blocks = (2 * count + 3) / 4;
  auto frames = at::empty({rows, count}, at::kLong);
  const Address address(key0, key1, step);
  std::vector<uint32_t> words(4 * blocks);
  std::vector<int64_t> chosen(count);
  std::vector<std::pair<uint64_t, int64_t>> order(count);
  for (int64_t row = 0; row < rows; ++row) {
    philox(address, uint32_t(samples.const_data_ptr<int64_t>()[row]), blocks, words.data());
    const int64_t n = lengths.const_data_ptr<int64_t>()[row], k = meants.const_data_ptr<int64_t>()[row];
    const bool enough = n >= k;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t bound = enough ? std::min(n - k + i + 1, n) : n;
      const int64_t pick = int64_t(double(words[i]) * 0x1p-32 * double(bound));
      const bool taken = enough && std::find(chosen.begin(), chosen.begin() + i, pick) != chosen.begin() + i;
      chosen[i] = taken ? bound - 1 : pick;
    }
    // What is padding stays behind every draw; equal draws keep their order.
    for (int64_t i = 0; i < count; ++i) order[i] = {i < k ? words[count + i] : uint64_t(1) << 32, i};
    std::sort(order.begin(), order.end());
    int64_t* const out = frames.mutable_data_ptr<int64_t>() + row * count;
    for (int64_t i = 0; i < count; ++i) out[i] = chosen[order[i].second];
  }
  return frames;
}

}  // namespace

TORCH_LIBRARY_IMPL(gaitfast, CPU, m) {
  m.impl("philox_bits", philox_bits);
  m.impl("unordered_frames", unordered_frames);
}

}  // namespace gaitfast
