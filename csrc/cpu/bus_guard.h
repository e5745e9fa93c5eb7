// A mapped file can shrink, or its disk can fail, while it is read: the kernel then sends SIGBUS, which ends the process.
// Within `readable` it ends the read instead.
#pragma once

#include <csetjmp>

namespace gaitfast {

// Where this thread goes on after a SIGBUS; null outside of `readable`.
extern thread_local sigjmp_buf* bus_escape;

// Makes sure that SIGBUS comes to us first; a signal that is not ours goes to whoever had it before.
void install_bus_handler();

// Runs `body` and says whether all it touched could be read. `body` is left in the middle where it could not, so it may
// hold nothing that has a destructor.
template <typename Body>
bool readable(Body&& body) {
  install_bus_handler();
  sigjmp_buf here;
  sigjmp_buf* const outer = bus_escape;
  const bool sound = sigsetjmp(here, 0) == 0;
  if (sound) {
    bus_escape = &here;
    body();
  }
  bus_escape = outer;
  return sound;
}

}  // namespace gaitfast
