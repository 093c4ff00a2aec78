// Lets a PyTorch without CUDA carry tensors of CUDA devices: the guard and the hooks that a CUDA build would
// have.
//
// The dispatcher and the backward threads ask them which device and stream are current, and record and wait
// for events, which the Python half is told of. Streams and events are numbers, and nothing ever waits.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <atomic>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
constexpr int MOST_DEVICES = 8;
int device_count = 0;
thread_local c10::DeviceIndex device = 0;
thread_local std::array<c10::StreamId, MOST_DEVICES> streams{};

using StreamCall = void (*)(int64_t what, int device, int64_t stream);
StreamCall recorded = nullptr;  // an event
StreamCall waited = nullptr;    // for an event
StreamCall used = nullptr;      // memory, by its address
void (*driver_set_device)(int ordinal) = nullptr;

void set_device(int ordinal) {
  device = static_cast<c10::DeviceIndex>(ordinal);
  if (driver_set_device) {
    driver_set_device(ordinal);
  }
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device getDevice() const override { return {CUDA, device}; }
  void setDevice(c10::Device d) const override { set_device(d.index()); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { set_device(d.index()); }
  c10::Device exchangeDevice(c10::Device d) const override {
    c10::Device before = getDevice();
    if (d.has_index()) {
      set_device(d.index());
    }
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(device_count);
  }

  c10::Stream getStream(c10::Device d) const noexcept override {
    int ordinal = d.has_index() ? d.index() : device;
    c10::Device known(CUDA, static_cast<c10::DeviceIndex>(ordinal));
    return c10::Stream(c10::Stream::UNSAFE, known, streams[ordinal]);
  }
  c10::Stream getDefaultStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    c10::Stream before = getStream(stream.device());
    streams[stream.device_index()] = stream.id();
    return before;
  }

  void record(void** event, const c10::Stream& s, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    static std::atomic<int64_t> last{0};
    if (*event == nullptr) {
      *event = reinterpret_cast<void*>(++last);
    }
    recorded(reinterpret_cast<int64_t>(*event), s.device_index(), s.id());
  }
  void block(void* event, const c10::Stream& s) const override {
    waited(reinterpret_cast<int64_t>(event), s.device_index(), s.id());
  }
  bool queryEvent(void*) const override { return true; }
  void recordDataPtrOnStream(const c10::DataPtr& memory, const c10::Stream& s) const override {
    used(reinterpret_cast<int64_t>(memory.get()), s.device_index(), s.id());
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

namespace at {
namespace {
// Found by the name of the class.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(::device_count); }
  c10::DeviceIndex current_device() const override { return ::device; }
  c10::DeviceIndex getCurrentDevice() const override { return ::device; }
  bool isPinnedPtr(const void*) const override { return false; }
};

REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace
}  // namespace at

extern "C" {

void guard_set_device_count(int count) { device_count = count; }
int guard_device() { return device; }
void guard_set_device(int ordinal) { set_device(ordinal); }
int64_t guard_stream(int ordinal) { return streams[ordinal]; }
void guard_set_stream(int ordinal, int64_t stream) { streams[ordinal] = stream; }

// Whom to tell of events, of memory that a stream uses, and of the current device.
void guard_tell(StreamCall of_records, StreamCall of_waits, StreamCall of_uses, void (*of_device)(int)) {
  recorded = of_records;
  waited = of_waits;
  used = of_uses;
  driver_set_device = of_device;
}

// The CUDA C++ kernels ask libtorch_cuda for it, which is this library's name.
int32_t aoti_torch_get_current_cuda_stream(int32_t ordinal, void** stream) {
  *stream = reinterpret_cast<void*>(streams[ordinal]);
  return 0;
}
}
