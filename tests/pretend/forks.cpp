// Loaded before anything else (LD_PRELOAD): a process may be forked after torch has differentiated on a device.
//
// torch forbids that by a handler that it registers when it starts the threads of its devices, since a child has none
// of them. The handler is left out, and a child starts threads of its own (pretended.py). It lacks nothing else: the
// device is the host.

#include <dlfcn.h>

#include <cstring>

using Handler = void (*)();

extern "C" {

int torch_starts_threads = 0;

int __register_atfork(Handler prepare, Handler parent, Handler child, void* object) {
  Dl_info found;
  if (torch_starts_threads && dladdr(reinterpret_cast<void*>(child), &found) &&
      std::strstr(found.dli_fname, "libtorch_cpu"))
    return 0;
  using Register = int (*)(Handler, Handler, Handler, void*);
  return reinterpret_cast<Register>(dlsym(RTLD_NEXT, "__register_atfork"))(prepare, parent, child, object);
}
}
