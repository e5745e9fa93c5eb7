// PyTorch's own OpenMP threads, without a second pool beside them (see setup.py): its runtime is called by name.
#pragma once

#include <ATen/Parallel.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>

namespace gaitfast {

// Runs task(begin, end) over [0, count) in equal pieces, one for each of at::get_num_threads() threads; all of it in
// this thread where PyTorch has another runtime or is already in a parallel region. Tasks do not throw.
template <class Task>
void in_team(int64_t count, const Task& task) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  static const auto number = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  static const auto members = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  if (threads <= 1 || at::in_parallel_region() || !parallel || !number || !members) {
    if (count > 0) task(0, count);
    return;
  }
  struct Job {
    const Task& task;
    int64_t count;
  } job{task, count};
  parallel(
      [](void* data) {
        const auto& [task, count] = *static_cast<Job*>(data);
        const int64_t size = (count + members() - 1) / members();
        const int64_t begin = number() * size;
        if (begin < count) task(begin, std::min(count, begin + size));
      },
      &job, static_cast<unsigned>(threads), 0);
}

}  // namespace gaitfast
