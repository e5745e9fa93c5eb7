// Moves the wall clock of a process: preloaded, it adds to CLOCK_REALTIME the seconds (int64) that the file named by
// GAITFAST_CLOCK_SHIFT holds. The file is mapped, so that writing to it lets the clock jump in a running process.
// The monotonic clock stays as it is, as it does when somebody sets the time.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ctime>
#include <cstdint>
#include <cstdlib>

static std::int64_t shift() {
  static const volatile std::int64_t* const seconds = [] {
    const char* path = std::getenv("GAITFAST_CLOCK_SHIFT");
    const int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void* memory = file < 0 ? MAP_FAILED : mmap(nullptr, sizeof(std::int64_t), PROT_READ, MAP_SHARED, file, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<const volatile std::int64_t*>(memory);
  }();
  return seconds ? *seconds : 0;
}

extern "C" int clock_gettime(clockid_t clock, timespec* now) {
  using Function = int (*)(clockid_t, timespec*);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "clock_gettime"));
  const int result = real(clock, now);
  if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += shift();
  return result;
}

extern "C" int gettimeofday(timeval* now, void*) {
  timespec precise;
  if (clock_gettime(CLOCK_REALTIME, &precise) != 0) return -1;
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return 0;
}

extern "C" std::time_t time(std::time_t* result) {
  timespec precise;
  if (clock_gettime(CLOCK_REALTIME, &precise) != 0) return -1;
  if (result) *result = precise.tv_sec;
  return precise.tv_sec;
}
