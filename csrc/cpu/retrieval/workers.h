// Threads for one call. Not OpenMP: a second pool beside PyTorch's would spin against it (see setup.py).
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace gaitfast::retrieval {

// Runs task(i) for i in [0, count), in any order, on at most `most` threads. The first exception that a task throws is
// thrown here, after all threads have ended.
template <class Task>
void parallel(int64_t count, const Task& task, int64_t most = at::get_num_threads()) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  const auto work = [&] {
    try {
      for (int64_t i = next++; i < count; i = next++) task(i);
    } catch (...) {
      const std::lock_guard lock(guard);
      if (!failure) failure = std::current_exception();
      next = count;
    }
  };
  const int64_t threads = std::min<int64_t>(most, count);
  std::vector<std::thread> helpers;
  for (int64_t t = 1; t < threads; ++t) helpers.emplace_back(work);
  work();
  for (auto& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace gaitfast::retrieval
