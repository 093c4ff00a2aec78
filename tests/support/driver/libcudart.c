// As much of the CUDA runtime as the CUDA C++ kernels call, on top of the driver in libcuda.c.
//
// NVIDIA's own runtime asks its driver for private tables, which a stand-in does not have.
#include <cuda.h>
#include <driver_types.h>
#include <stdlib.h>
#include <vector_types.h>

typedef struct Kernel {
  const void* host;  // the function by which the program names it
  CUfunction function;
  struct Kernel* next;
} Kernel;

typedef struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} Configuration;

static Kernel* kernels;
static __thread Configuration configuration;
static __thread cudaError_t last;
static void (*memory_set)(const void* memory, size_t bytes, cudaStream_t stream);
static void (*host_waits)(const char* what);

static cudaError_t keep(CUresult result) {
  return last = result == CUDA_SUCCESS ? last : (cudaError_t)result;
}

// The Python half is told of what is no launch.
void standin_tell(void (*set)(const void*, size_t, cudaStream_t), void (*waits)(const char*)) {
  memory_set = set;
  host_waits = waits;
}

// ------------------------------------------------------------------------- kernels of a program

void** __cudaRegisterFatBinary(void* binary) { return (void**)binary; }
void __cudaRegisterFatBinaryEnd(void** handle) {}
void __cudaUnregisterFatBinary(void** handle) {}
char __cudaInitModule(void** handle) { return 0; }
void __cudaRegisterVar(void** handle, char* host, char* device, const char* name, int external, size_t size,
                       int constant, int global) {}

void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name, int threads,
                            uint3* thread, uint3* block, dim3* blocks, dim3* grids, int* warps) {
  Kernel* kernel = malloc(sizeof *kernel);
  *kernel = (Kernel){.host = host, .next = kernels};
  cuModuleGetFunction(&kernel->function, NULL, name);
  kernels = kernel;
}

cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* host) {
  for (Kernel* kernel = kernels; kernel; kernel = kernel->next) {
    if (kernel->host == host) {
      *handle = (cudaKernel_t)kernel->function;
      return cudaSuccess;
    }
  }
  return last = cudaErrorInvalidDeviceFunction;
}

// ------------------------------------------------------------------------------------- launches

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = (Configuration){grid, block, shared, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *(cudaStream_t*)stream = configuration.stream;
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  CUlaunchConfig config = {.gridDimX = grid.x,
                           .gridDimY = grid.y,
                           .gridDimZ = grid.z,
                           .blockDimX = block.x,
                           .blockDimY = block.y,
                           .blockDimZ = block.z,
                           .sharedMemBytes = (unsigned)shared,
                           .hStream = (CUstream)stream};
  return keep(cuLaunchKernelEx(&config, (CUfunction)kernel, arguments, NULL));
}

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  cudaKernel_t kernel;
  cudaError_t found = __cudaGetKernel(&kernel, host);
  return found ? found : __cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

// -------------------------------------------------------------------- memory, streams, questions

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  CUdeviceptr known;
  cudaError_t status =
      keep(cuPointerGetAttribute(&known, CU_POINTER_ATTRIBUTE_DEVICE_POINTER, (CUdeviceptr)memory));
  memory_set(memory, bytes, stream);
  return status;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (kind == cudaMemcpyDeviceToHost) {
    host_waits("cudaMemcpyAsync to the host");
    __builtin_memcpy(to, from, bytes);
  }
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return host_waits("cudaStreamSynchronize"), cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  CUstreamCaptureStatus found;
  cuStreamIsCapturing((CUstream)stream, &found);
  return *status = (enum cudaStreamCaptureStatus)found, cudaSuccess;
}

cudaError_t cudaGetLastError(void) {
  cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError(void) { return last; }

const char* cudaGetErrorString(cudaError_t error) {
  const char* text;
  cuGetErrorString((CUresult)error, &text);
  return text;
}

cudaError_t cudaGetDevice(int* device) { return keep(cuCtxGetDevice(device)); }
cudaError_t cudaGetDeviceCount(int* count) { return keep(cuDeviceGetCount(count)); }
cudaError_t cudaSetDevice(int device) {
  CUcontext context;
  cuDevicePrimaryCtxRetain(&context, device);
  return keep(cuCtxSetCurrent(context));
}

cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  return keep(cuDeviceGetAttribute(value, (CUdevice_attribute)attribute, device));
}

// CUB asks: the version of the machine code, and the blocks that fit on an SM.
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* host) {
  *attributes =
      (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .ptxVersion = 90, .binaryVersion = 90};
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host, int threads,
                                                                   size_t shared, unsigned flags) {
  return *blocks = 2048 / threads, cudaSuccess;
}
