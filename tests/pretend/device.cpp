// A CUDA device in the host's memory, for a build of torch without CUDA: its tensors have numbers.
//
// Memory is the host's. Every operation is the CPU's: `on_cpu` hands it tensors of the CPU over the same memory, and
// makes what comes back the device's again. What a real device would refuse is refused, above all a tensor of the host
// among those of the device. Streams and events do nothing, since everything has already happened.
//
// Load this before torch is imported: it asks only once whether there is CUDA.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <unordered_map>

using at::IntArrayRef;
using at::Tensor;
using c10::DataPtr;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Storage;
using c10::StorageImpl;
using c10::Stream;

namespace {

constexpr DeviceIndex kDevices = 2;
constexpr size_t kAlignment = 64;

thread_local DeviceIndex current = 0;

// What was counted since the program began: the host's waits for the device, and copies to it.
std::atomic<int64_t> waits{0}, uploads{0};

// ---------------------------------------------------------------- memory

void* take(size_t bytes) {
  void* memory = nullptr;
  TORCH_CHECK(posix_memalign(&memory, kAlignment, bytes ? bytes : 1) == 0, "no memory for ", bytes, " bytes");
  return memory;
}

struct DeviceMemory final : c10::Allocator {
  DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? take(bytes) : nullptr;
    return {memory, memory, &std::free, Device(DeviceType::CUDA, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

// The host's memory that a device would read without a copy; only that it was asked for is remembered.
struct PinnedMemory final : c10::Allocator {
  static inline std::mutex lock;
  static inline std::map<uintptr_t, size_t> blocks;
  static void free(void* memory) {
    std::lock_guard<std::mutex> held(lock);
    blocks.erase(reinterpret_cast<uintptr_t>(memory));
    std::free(memory);
  }
  static bool holds(const void* pointer) {
    std::lock_guard<std::mutex> held(lock);
    auto after = blocks.upper_bound(reinterpret_cast<uintptr_t>(pointer));
    return after != blocks.begin() &&
           reinterpret_cast<uintptr_t>(pointer) < std::prev(after)->first + std::prev(after)->second;
  }
  DataPtr allocate(size_t bytes) override {
    void* memory = take(bytes);
    std::lock_guard<std::mutex> held(lock);
    blocks[reinterpret_cast<uintptr_t>(memory)] = bytes ? bytes : 1;
    return {memory, memory, &free, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

DeviceMemory device_memory;
PinnedMemory pinned_memory;
const bool allocator_set = (c10::SetAllocator(DeviceType::CUDA, &device_memory, 100), true);

// ---------------------------------------------------------------- random numbers

// The CPU's generator, said to be the device's.
struct Generator final : c10::GeneratorImpl {
  at::Generator inner;
  explicit Generator(DeviceIndex index, at::Generator inner = at::detail::createCPUGenerator())
      : GeneratorImpl(Device(DeviceType::CUDA, index), c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        inner(std::move(inner)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override { return new Generator(device_.index(), inner.clone()); }
};

const at::Generator& default_generator(DeviceIndex index) {
  static const at::Generator generators[kDevices] = {
      at::make_generator<Generator>(0, at::detail::getDefaultCPUGenerator()),
      at::make_generator<Generator>(1, at::detail::getDefaultCPUGenerator())};
  return generators[index < 0 ? current : index];
}

}  // namespace

// ---------------------------------------------------------------- the device

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex current_device() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  Device getDeviceFromPtr(void*) const override { return {DeviceType::CUDA, current}; }
  bool isPinnedPtr(const void* pointer) const override { return PinnedMemory::holds(pointer); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<::Generator>(index < 0 ? current : index);
  }
  void deviceSynchronize(DeviceIndex) const override { ++waits; }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

namespace {

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Device on(DeviceIndex index) { return {DeviceType::CUDA, index < 0 ? current : index}; }
  static Stream only(Device device) { return Stream(Stream::DEFAULT, on(device.index())); }
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    Device before = on(current);
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return on(current); }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    current = device.index() < 0 ? current : device.index();
  }
  Stream getStream(Device device) const override { return only(device); }
  Stream getDefaultStream(Device device) const override { return only(device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return only(device); }
  Stream getNewStream(Device device, int) const override { return only(device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { ++waits; }
  void synchronizeEvent(void*) const override { ++waits; }
  void synchronizeDevice(const DeviceIndex) const override { ++waits; }
};

const c10::impl::DeviceGuardImplRegistrar registered(DeviceType::CUDA, new Guard());

// ---------------------------------------------------------------- the same memory, seen from either side

bool on_device(const Tensor& tensor) { return tensor.defined() && tensor.is_cuda(); }

Tensor over(Storage storage, const Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  made._set_conj(like.is_conj());
  made._set_neg(like.is_neg());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

// A storage of the CPU over a device's memory, which it keeps.
Storage cpu_storage(const Storage& storage) {
  auto forget = [](void* kept) { delete static_cast<Storage*>(kept); };
  DataPtr memory(const_cast<void*>(storage.data()), new Storage(storage), forget, Device(DeviceType::CPU));
  return Storage(Storage::use_byte_size_t(), storage.nbytes(), std::move(memory), c10::GetCPUAllocator(), true);
}

// Gives a storage's memory to the device.
DataPtr as_device(DataPtr memory, Device device) {
  void* data = memory.get();
  auto deleter = memory.get_deleter();
  return {data, memory.release_context(), deleter, device};
}

// A call of the CPU's kernel in the place of one of the device's.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), name_(op.schema().name()), stack_(stack) {}

  void run() {
    auto& schema = op_.schema();
    const size_t begin = stack_->size() - schema.arguments().size();
    for (size_t i = begin; i < stack_->size(); ++i) find_device((*stack_)[i]);
    for (size_t i = begin; i < stack_->size(); ++i) {
      auto* alias = schema.arguments()[i - begin].alias_info();
      (*stack_)[i] = given((*stack_)[i], alias && alias->isWrite());
    }
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    for (auto& [original, pair] : storages_) keep_memory(pair.first, pair.second);
    for (auto& [host, original] : tensors_) keep_shape(host, original);
    for (size_t i = stack_->size() - schema.returns().size(); i < stack_->size(); ++i)
      (*stack_)[i] = returned((*stack_)[i]);
  }

 private:
  void find_device(const c10::IValue& value) {
    auto see = [&](const Tensor& tensor) {
      if (!on_device(tensor)) return;
      TORCH_CHECK(!seen_ || device_ == tensor.device() || tensor.dim() == 0,
                  "Expected all tensors to be on the same device, but ", name_, " was given ", device_, " and ",
                  tensor.device());
      device_ = tensor.device();
      seen_ = true;
    };
    if (value.isTensor()) see(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorList()) see(tensor);
    if (is_nested(value))
      for (const c10::IValue& list : value.toListRef()) find_device(list);
    if (value.isDevice() && value.toDevice().is_cuda()) device_ = Guard::on(value.toDevice().index()), seen_ = true;
  }

  static bool is_nested(const c10::IValue& value) {
    return value.isList() && !value.toListRef().empty() && value.toListRef()[0].isTensorList();
  }

  void refuse(const Tensor& tensor, bool refused) const {
    TORCH_CHECK(!refused || !tensor.defined(), "Expected all tensors to be on the same device, but ", name_,
                " was given a tensor of ", tensor.device(), " beside those of ", device_);
  }

  Tensor host(const Tensor& tensor) {
    auto* key = tensor.storage().unsafeGetStorageImpl();
    auto found = storages_.find(key);
    if (found == storages_.end())
      found = storages_.emplace(key, std::pair(cpu_storage(tensor.storage()), tensor.storage())).first;
    Tensor made = over(found->second.first, tensor, c10::DispatchKey::CPU);
    tensors_.emplace_back(made, tensor);
    return made;
  }

  c10::IValue given(const c10::IValue& value, bool written) {
    if (value.isTensor()) {
      const Tensor tensor = value.toTensor();
      if (on_device(tensor)) return host(tensor);
      refuse(tensor, written || (tensor.defined() && tensor.dim() > 0));
    } else if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const Tensor& tensor : value.toTensorList()) {
        refuse(tensor, !on_device(tensor));
        made.push_back(tensor.defined() ? host(tensor) : tensor);
      }
      return made;
    } else if (is_nested(value)) {
      c10::List<c10::List<Tensor>> made;
      for (const c10::IValue& list : value.toListRef()) made.push_back(given(list, written).toTensorList());
      return made;
    } else if (value.isOptionalTensorList()) {  // indices, which the host may have
      c10::List<std::optional<Tensor>> made;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorList())
        made.push_back(tensor && on_device(*tensor) ? std::optional<Tensor>(host(*tensor)) : tensor);
      return made;
    } else if (value.isDevice()) {
      return Device(DeviceType::CPU);
    } else if (value.isGenerator()) {
      auto* generator = dynamic_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl());
      TORCH_CHECK(generator, "Expected a 'cuda' device type for generator but found 'cpu'");
      return generator->inner;
    }
    return value;
  }

  // What was enlarged has other memory now.
  void keep_memory(const Storage& host, const Storage& original) {
    if (host.data() == original.data()) return;
    auto* impl = original.unsafeGetStorageImpl();
    auto* from = host.unsafeGetStorageImpl();
    impl->set_data_ptr_noswap(
        as_device(from->set_data_ptr(DataPtr(from->mutable_data(), Device(DeviceType::CPU))), original.device()));
    impl->set_nbytes(from->nbytes());
  }

  void keep_shape(const Tensor& host, const Tensor& original) {
    if (host.sizes() != original.sizes() || host.strides() != original.strides() ||
        host.storage_offset() != original.storage_offset())
      original.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }

  Tensor returned(const Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (auto& [host, original] : tensors_)
      if (host.is_same(tensor)) return original;
    auto* key = tensor.storage().unsafeGetStorageImpl();
    for (auto& [original, pair] : storages_)
      if (pair.first.unsafeGetStorageImpl() == key) return over(pair.second, tensor, c10::DispatchKey::CUDA);
    auto found = made_.find(key);
    if (found == made_.end()) {
      auto memory = as_device(key->set_data_ptr(DataPtr(key->mutable_data(), Device(DeviceType::CPU))), device_);
      Storage storage(Storage::use_byte_size_t(), key->nbytes(), std::move(memory), &device_memory, true);
      found = made_.emplace(key, std::pair(storage, tensor)).first;
    }
    return over(found->second.first, tensor, c10::DispatchKey::CUDA);
  }

  c10::IValue returned(const c10::IValue& value) {
    if (value.isTensor()) return returned(value.toTensor());
    if (is_nested(value)) {
      c10::List<c10::List<Tensor>> made;
      for (const c10::IValue& list : value.toListRef()) made.push_back(returned(list).toTensorList());
      return made;
    }
    if (!value.isTensorList()) return value;
    c10::List<Tensor> made;
    for (const Tensor& tensor : value.toTensorList()) made.push_back(returned(tensor));
    return made;
  }

  const c10::OperatorHandle& op_;
  const std::string& name_;
  torch::jit::Stack* stack_;
  Device device_ = Guard::on(-1);
  bool seen_ = false;
  std::unordered_map<StorageImpl*, std::pair<Storage, Storage>> storages_;  // of the device: as the CPU's, and itself
  std::vector<std::pair<Tensor, Tensor>> tensors_;                          // as the CPU's, and itself
  std::unordered_map<StorageImpl*, std::pair<Storage, Tensor>> made_;       // by the kernel; the tensor keeps the key
};

void on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  static const std::set<std::string> reads = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal",
                                              "aten::masked_select"};
  waits += reads.count(op.schema().name());
  Call(op, stack).run();
}

// A collective of the CPU's group on the memory behind the device's tensors. NCCL knows means, gloo does not: they are
// sums of shares.
void collective(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  auto& schema = op.schema();
  const size_t begin = stack->size() - schema.arguments().size();
  auto argument = [&](const char* name) -> c10::IValue* {
    auto index = schema.argumentIndexWithName(name);
    return index ? &(*stack)[begin + *index] : nullptr;
  };
  auto* reduced = argument("reduce_op");
  if (reduced && reduced->toCustomClass<c10d::ReduceOp>()->op_ == c10d::ReduceOp::AVG) {
    *reduced = c10::make_intrusive<c10d::ReduceOp>(c10d::ReduceOp::SUM);
    const int size = argument("process_group")->toCustomClass<c10d::ProcessGroup>()->getSize();
    if (auto* own = argument("tensors")) {
      for (Tensor tensor : own->toTensorVector()) tensor.div_(size);
    } else if (auto* input = argument("input_tensor")) {
      *input = input->toTensor().div(size);
    } else {
      auto* inputs = argument("inputs");
      TORCH_CHECK(inputs, "no mean by ", schema.name());
      c10::List<Tensor> shares;
      for (const Tensor& tensor : inputs->toTensorVector()) shares.push_back(tensor.div(size));
      *inputs = shares;
    }
  }
  on_cpu(op, keys, stack);
}

// ---------------------------------------------------------------- what is no kernel of the CPU's

c10::DispatchKeySet keys() { return c10::DispatchKeySet(c10::DispatchKey::CUDA); }

Device target(std::optional<Device> device) { return Guard::on(device ? device->index() : -1); }

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard there(target(device));
  return at::detail::empty_generic(size, &device_memory, keys(), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard there(target(device));
  return at::detail::empty_strided_generic(size, stride, &device_memory, keys(), c10::dtype_or_default(dtype));
}

Tensor host_view(const Tensor& tensor) {
  return on_device(tensor) ? over(cpu_storage(tensor.storage()), tensor, c10::DispatchKey::CPU) : tensor;
}

Tensor& copy(Tensor& self, const Tensor& from, bool non_blocking) {
  const bool upload = self.is_cuda() && from.is_cpu(), download = self.is_cpu() && from.is_cuda();
  TORCH_CHECK(upload || download || (self.is_cuda() && from.is_cuda()), "no copy from ", from.device(), " to ",
              self.device());
  uploads += upload;
  waits += download && !(non_blocking && PinnedMemory::holds(self.const_data_ptr()));
  host_view(self).copy_(host_view(from));
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  return copy(target, self, non_blocking);
}

Tensor& set_nothing(Tensor& self) {
  return at::native::set_storage_cpu_(self, Storage(Storage::use_byte_size_t(), 0, &device_memory, true), 0, {0}, {});
}

void resize_storage(const Tensor& over_it, int64_t bytes) {
  c10::DeviceGuard there(over_it.device());
  at::native::resize_bytes_cpu(over_it.storage().unsafeGetStorageImpl(), bytes);
}

const Tensor& resize(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard there(self.device());
  return at::native::resize_(self, size, format);
}

void record_stream(Tensor&, Stream) {}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("copy_", copy);
  library.impl("_copy_from", copy_from);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, Storage)>(at::native::set_));
  library.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  library.impl("set_.source_Tensor", at::native::set_tensor_);
  library.impl("set_", set_nothing);
  library.impl("record_stream", record_stream);
  // These ask for a device's own library where they are not told better.
  for (auto name : {"convolution", "convolution_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

// After a fork: a child has none of the threads that differentiate on the devices, and torch would not start them
// again. Each sets the number of its threads first, for which the first to do so in a child replaces a pool: two at once
// would find none there.
struct Engine : torch::autograd::Engine {
  static void restart() {
    at::set_num_threads(at::get_num_threads());
    static_cast<Engine&>(get_default_engine()).start_device_threads();
  }
};

// torch has these already, for a backend of the device's own, and would warn of the change.
struct Silent final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
} silent;
auto* const quiet = new c10::WarningUtils::WarningHandlerGuard(&silent);

TORCH_LIBRARY_IMPL(c10d, CUDA, library) {
  for (auto name : {"send", "recv_", "recv_any_source_", "reduce_", "broadcast_", "allreduce_", "allreduce_coalesced_",
                    "allgather_", "_allgather_base_", "allgather_coalesced_", "allgather_into_tensor_coalesced_",
                    "reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "gather_",
                    "scatter_", "alltoall_", "alltoall_base_", "barrier"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&collective>());
}

const bool loud = (delete quiet, true);

TORCH_LIBRARY(pretend, library) {
  library.def("host_view(Tensor tensor) -> Tensor");
  library.def("resize_storage(Tensor over_it, int bytes) -> ()");
  library.def("restart() -> ()", &Engine::restart);
  library.def("counts() -> (int, int)", []() { return std::tuple<int64_t, int64_t>(waits.load(), uploads.load()); });
}

TORCH_LIBRARY_IMPL(pretend, CompositeExplicitAutograd, library) {
  library.impl("host_view", host_view);
  library.impl("resize_storage", resize_storage);
}
