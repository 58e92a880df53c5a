// Loaded before anything else (LD_PRELOAD): torch may be forked after it has differentiated on a device.
//
// torch forbids that, since the device's threads are not in the child. A child of ours starts threads of its own, and
// there is nothing else that it could lack: the device is the host.

#include <cstring>
#include <dlfcn.h>

using Handler = void (*)();

extern "C" int __register_atfork(Handler prepare, Handler parent, Handler child, void* object) {
  Dl_info found;
  if (child && !prepare && dladdr(reinterpret_cast<void*>(child), &found) && std::strstr(found.dli_fname, "libtorch_cpu"))
    return 0;
  using Register = int (*)(Handler, Handler, Handler, void*);
  return reinterpret_cast<Register>(dlsym(RTLD_NEXT, "__register_atfork"))(prepare, parent, child, object);
}
