#include "cpu/bus_guard.h"

#include <csignal>
#include <mutex>

namespace gaitfast {

thread_local sigjmp_buf* bus_escape = nullptr;

namespace {

struct sigaction previous;
std::mutex installing;

void on_bus_error(int, siginfo_t*, void*) {
  if (bus_escape != nullptr) siglongjmp(*bus_escape, 1);
  sigaction(SIGBUS, &previous, nullptr);  // not ours: the instruction runs again, and the signal finds its owner
}

}  // namespace

void install_bus_handler() {
  struct sigaction current;
  sigaction(SIGBUS, nullptr, &current);
  if ((current.sa_flags & SA_SIGINFO) != 0 && current.sa_sigaction == on_bus_error) return;
  const std::lock_guard<std::mutex> lock(installing);
  struct sigaction ours = {};
  ours.sa_sigaction = on_bus_error;
  // NODEFER: the handler is left by a jump, and the signal must not stay blocked.
  ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  struct sigaction before;
  sigaction(SIGBUS, &ours, &before);
  if ((before.sa_flags & SA_SIGINFO) == 0 || before.sa_sigaction != on_bus_error) previous = before;
}

}  // namespace gaitfast
