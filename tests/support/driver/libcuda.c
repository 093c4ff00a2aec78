// A libcuda that checks and records what a program asks of a GPU, and runs nothing.
//
// Triton finds it in the place of NVIDIA's. A call that a real driver would refuse, or that a kernel would
// not survive, is refused here too, and `standin_fault` says why. The limits are those of the CUDA driver
// API's documentation and of the compute capabilities in the CUDA programming guide.
#include <cuda.h>

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API CUresult CUDAAPI
enum { MOST_DEVICES = 8, PLAIN_SHARED = 48 * 1024, MOST_THREADS = 1024, REGISTERS = 65536 };

// ------------------------------------------------------------------------------------- state

typedef struct {
  int major, minor, processors;
  int shared_per_block;  // bytes that a kernel may opt in to
  int shared_per_processor;
} Device;

typedef struct {
  uint64_t first, end;  // addresses
  int device;
} Memory;

typedef struct {
  const char* name;
  int shared;  // bytes of dynamic shared memory that it opted in to
} Function;

typedef struct {
  const char* kernel;
  uint64_t stream;
  unsigned grid[3], threads, shared, cluster;
  int device;
} Launch;

static Device devices[MOST_DEVICES];
static int device_count;
static __thread int current;  // the ordinal of the current context's device

static Memory* memory;
static size_t memory_count, memory_room;

static Launch* launches;
static size_t launch_count, launch_room;

static int capturing;
static char fault[512];

static CUresult refuse(CUresult error, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(fault, sizeof fault, format, arguments);
  va_end(arguments);
  return error;
}

static void* room_for_one(void* items, size_t count, size_t* room, size_t size) {
  if (count < *room) {
    return items;
  }
  *room = *room ? 2 * *room : 256;
  return realloc(items, *room * size);
}

static const Memory* memory_at(uint64_t address) {
  for (size_t i = memory_count; i-- > 0;) {  // what was allocated last is used most
    if (memory[i].first <= address && address < memory[i].end) {
      return &memory[i];
    }
  }
  return NULL;
}

// ------------------------------------------------------------------- what the Python half calls

int standin_add_device(int major, int minor, int processors, int shared_per_block, int shared_per_processor) {
  devices[device_count] = (Device){major, minor, processors, shared_per_block, shared_per_processor};
  return device_count++;
}

void standin_set_device(int ordinal) { current = ordinal; }
void standin_set_capturing(int now) { capturing = now; }

void standin_allocated(uint64_t address, uint64_t bytes, int device) {
  memory = room_for_one(memory, memory_count, &memory_room, sizeof *memory);
  memory[memory_count++] = (Memory){address, address + bytes, device};
}

void standin_freed(uint64_t address) {
  for (size_t i = memory_count; i-- > 0;) {
    if (memory[i].first == address) {
      memory[i] = memory[--memory_count];
      return;
    }
  }
}

size_t standin_launch_count(void) { return launch_count; }
const Launch* standin_launch(size_t i) { return &launches[i]; }

// The reason of the last refusal, once.
const char* standin_fault(void) {
  static char taken[sizeof fault];
  memcpy(taken, fault, sizeof fault);
  fault[0] = 0;
  return taken;
}

// ------------------------------------------------------------------- devices, contexts, errors

API cuInit(unsigned flags) { return CUDA_SUCCESS; }
API cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
API cuGetErrorString(CUresult error, const char** text) { return *text = fault, CUDA_SUCCESS; }
API cuDeviceGetCount(int* count) { return *count = device_count, CUDA_SUCCESS; }
API cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }

API cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  const Device* d = &devices[device];
  switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = d->shared_per_block;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = d->shared_per_processor;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = REGISTERS;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = d->processors;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = d->major;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = d->minor;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    default:
      *value = 0;  // clocks and widths, which are only printed
  }
  return CUDA_SUCCESS;
}

// A context is its device's ordinal plus one: NULL is none.
API cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = (CUcontext)(intptr_t)(device + 1), CUDA_SUCCESS;
}
API cuCtxGetCurrent(CUcontext* context) { return cuDevicePrimaryCtxRetain(context, current); }
API cuCtxSetCurrent(CUcontext context) { return current = (int)(intptr_t)context - 1, CUDA_SUCCESS; }
API cuCtxGetDevice(CUdevice* device) { return *device = current, CUDA_SUCCESS; }
API cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
API cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

// ---------------------------------------------------------------------------- modules, memory

API cuModuleLoadData(CUmodule* module, const void* image) { return *module = (CUmodule)image, CUDA_SUCCESS; }
API cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

API cuModuleGetFunction(CUfunction* handle, CUmodule module, const char* name) {
  Function* function = malloc(sizeof *function);
  *function = (Function){strdup(name), PLAIN_SHARED};
  return *handle = (CUfunction)function, CUDA_SUCCESS;
}

API cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? MOST_THREADS : 0;
  return CUDA_SUCCESS;
}

API cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  Function* function = (Function*)handle;
  int most = devices[current].shared_per_block;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    return CUDA_ERROR_NOT_SUPPORTED;  // as a driver that does not know it: Triton has another way
  }
  if (value > most) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %d bytes of shared memory, of %d", function->name, value,
                  most);
  }
  function->shared = value;
  return CUDA_SUCCESS;
}

API cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

// Triton asks it of each pointer that it passes to a kernel.
API cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  const Memory* found = memory_at(address);
  if (found == NULL) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "no memory of a device at address %#llx", address);
  }
  if (found->device != current) {
    return refuse(CUDA_ERROR_INVALID_CONTEXT, "memory of device %d in a launch on %d", found->device,
                  current);
  }
  *(CUdeviceptr*)value = address;
  return CUDA_SUCCESS;
}

// ------------------------------------------------------------------------------ TMA descriptors

static int bytes_of(CUtensorMapDataType type) {
  switch ((int)type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 4;
  }
}

static unsigned span_of(CUtensorMapSwizzle swizzle) {
  switch ((int)swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      return ~0u;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return 64;
    default:
      return 128;
  }
}

API cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* steps, CUtensorMapInterleave interleave,
                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                           CUtensorMapFloatOOBfill fill) {
#define ILLEGAL(...) return refuse(CUDA_ERROR_INVALID_VALUE, "TMA descriptor: " __VA_ARGS__)
  if (devices[current].major < 9) ILLEGAL("there is none before compute capability 9.0");
  if ((uintptr_t)map % 64) ILLEGAL("it lies at %p, not at a multiple of 64 bytes", (void*)map);
  if ((uintptr_t)address % 16) ILLEGAL("memory at %p, not at a multiple of 16 bytes", address);
  if (rank < 1 || rank > 5) ILLEGAL("%u dimensions, of 1 to 5", rank);

  uint64_t width = bytes_of(type), last = 0;  // last: bytes from the first element to the last one
  for (unsigned i = 0; i < rank; i++) {
    uint64_t stride =
        i == 0 ? width : strides[i - 1];  // strides leave out the innermost, which is contiguous
    if (sizes[i] < 1 || sizes[i] > 1ull << 32)
      ILLEGAL("size %llu in dimension %u", (unsigned long long)sizes[i], i);
    if (box[i] < 1 || box[i] > 256) ILLEGAL("a box of %u in dimension %u, of 1 to 256", box[i], i);
    if (steps[i] < 1 || steps[i] > 8) ILLEGAL("a step of %u in dimension %u, of 1 to 8", steps[i], i);
    if (i > 0 && (stride % 16 || stride >= 1ull << 40)) {
      ILLEGAL("a stride of %llu bytes in dimension %u, not a multiple of 16", (unsigned long long)stride, i);
    }
    last += (sizes[i] - 1) * stride;
  }
  uint64_t row = box[0] * width;
  if (row % 16) ILLEGAL("rows of a box have %llu bytes, not a multiple of 16", (unsigned long long)row);
  if (row > span_of(swizzle)) {
    ILLEGAL("rows of a box have %llu bytes, and its swizzle spans %u", (unsigned long long)row,
            span_of(swizzle));
  }
  const Memory* found = memory_at((uint64_t)(uintptr_t)address);
  if (found == NULL) ILLEGAL("no memory of a device at %p", address);
  if ((uintptr_t)address + last + width > found->end) ILLEGAL("it ends after the memory at %p", address);
  if (found->device != current) ILLEGAL("of memory of device %d, for a launch on %d", found->device, current);
  return CUDA_SUCCESS;
#undef ILLEGAL
}

// ------------------------------------------------------------------------------------ launches

API cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* config) {
  return *count = devices[current].processors, CUDA_SUCCESS;
}

API cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return *status = capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

static unsigned cluster_of(const CUlaunchConfig* config) {
  for (unsigned i = 0; i < config->numAttrs; i++) {
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      return config->attrs[i].value.clusterDim.x;
    }
  }
  return 1;
}

API cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction handle, void** arguments, void** extra) {
#define ILLEGAL(...) return refuse(CUDA_ERROR_INVALID_VALUE, __VA_ARGS__)
  const Function* function = (const Function*)handle;
  const char* name = function->name;
  unsigned x = c->gridDimX, y = c->gridDimY, z = c->gridDimZ, cluster = cluster_of(c);
  unsigned threads = c->blockDimX * c->blockDimY * c->blockDimZ;
  if (x < 1 || x > INT32_MAX) ILLEGAL("%s: a grid of %u programs in x", name, x);
  if (y < 1 || y > 65535 || z < 1 || z > 65535)
    ILLEGAL("%s: a grid of %ux%ux%u, of 65535 in y and z", name, x, y, z);
  if (threads < 1 || threads > MOST_THREADS) ILLEGAL("%s: %u threads, of %d", name, threads, MOST_THREADS);
  if (c->sharedMemBytes > (unsigned)function->shared) {
    ILLEGAL("%s: %u bytes of shared memory, opted in to %d", name, c->sharedMemBytes, function->shared);
  }
  if (cluster > 8 || x % cluster) ILLEGAL("%s: clusters of %u in a grid of %u", name, cluster, x);
  launches = room_for_one(launches, launch_count, &launch_room, sizeof *launches);
  launches[launch_count++] = (Launch){.kernel = name,
                                      .stream = (uint64_t)(uintptr_t)c->hStream,
                                      .grid = {x, y, z},
                                      .threads = threads,
                                      .shared = c->sharedMemBytes,
                                      .cluster = cluster,
                                      .device = current};
  return CUDA_SUCCESS;
#undef ILLEGAL
}
