// The GPUs themselves: how many, of which compute capability, with how much memory; and the calls
// that ask for it or wait for all of one.
#define _GNU_SOURCE
#include "fake.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#undef cudaGetDeviceProperties

typedef struct {
    int sm, processors, shared, threads, cache;
} Chip;

// shared memory a block may ask for and threads a processor holds: CUDA C++ Programming Guide,
// compute capabilities; processors and L2 bytes: of one card each (A100, RTX 3090, 4090, H200,
// B200, RTX 5090)
static const Chip chips[] = {
    {80, 108, 166912, 2048, 40 << 20},   {86, 82, 101376, 1536, 6 << 20},
    {89, 128, 101376, 1536, 72 << 20},   {90, 132, 232448, 2048, 50 << 20},
    {100, 148, 232448, 2048, 126 << 20}, {120, 170, 101376, 1536, 96 << 20}};

__thread int fake_gpu;
static __thread cudaError_t last;

static double number(const char* name, double otherwise) {
    const char* found = getenv(name);
    return found && *found ? atof(found) : otherwise;
}

int fake_sm(void) { return (int)number("HMC_FAKE_SM", 120); }
int fake_gpus(void) { return (int)number("HMC_FAKE_GPUS", 1); }
long long fake_gpu_bytes(void) { return (long long)(number("HMC_FAKE_GB", 32) * (1 << 30)); }

static const Chip* chip(void) {
    const Chip* found = chips;
    for (size_t at = 0; at < sizeof chips / sizeof *chips; at++)
        if (chips[at].sm <= fake_sm()) found = chips + at;
    return found;
}
int fake_shared_bytes(void) { return chip()->shared; }

cudaError_t fake_error(cudaError_t error) {
    if (error) last = error;
    return error;
}
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last;
    last = 0;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last; }
const char* cudaGetErrorString(cudaError_t error) {
    static __thread char text[64];
    snprintf(text, sizeof text, "error %d of a played GPU", error);
    return text;
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

cudaError_t cudaGetDeviceCount(int* count) {
    *count = fake_gpus();
    return 0;
}
cudaError_t cudaGetDevice(int* gpu) {
    *gpu = fake_gpu;
    return 0;
}
cudaError_t cudaSetDevice(int gpu) {
    if (gpu < 0 || gpu >= fake_gpus()) return fake_error(cudaErrorInvalidDevice);
    fake_gpu = gpu;
    return 0;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* found, int gpu) {
    const Chip* of = chip();
    memset(found, 0, sizeof *found);
    snprintf(found->name, sizeof found->name, "played sm_%d", fake_sm());
    found->totalGlobalMem = (size_t)fake_gpu_bytes();
    found->major = fake_sm() / 10;
    found->minor = fake_sm() % 10;
    found->multiProcessorCount = of->processors;
    found->sharedMemPerBlock = 49152;
    found->sharedMemPerBlockOptin = (size_t)of->shared;
    found->sharedMemPerMultiprocessor = (size_t)of->shared + 1024;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->warpSize = 32;
    found->maxThreadsPerBlock = 1024;
    found->maxThreadsPerMultiProcessor = of->threads;
    found->maxBlocksPerMultiProcessor = of->threads / 64;
    found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
    found->maxThreadsDim[2] = 64;
    found->maxGridSize[0] = 2147483647;
    found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->l2CacheSize = of->cache;
    found->textureAlignment = 512;
    found->asyncEngineCount = 2;
    found->concurrentKernels = found->unifiedAddressing = found->canMapHostMemory = 1;
    found->managedMemory = found->cooperativeLaunch = 1;
    return 0;
}

cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr asked, int gpu) {
    const Chip* of = chip();
    switch ((int)asked) {
        case cudaDevAttrComputeCapabilityMajor: *value = fake_sm() / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = fake_sm() % 10; break;
        case cudaDevAttrMultiProcessorCount: *value = of->processors; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = of->shared; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = of->shared + 1024; break;
        case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = of->threads; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrL2CacheSize: *value = of->cache; break;
        case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrUnifiedAddressing:
        case cudaDevAttrCooperativeLaunch: *value = 1; break;
        default: *value = 0;
    }
    return 0;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) {
    *least = 0;
    *most = -5;
    return 0;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return 0;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaDeviceCanAccessPeer(int* can, int gpu, int other) {
    *can = gpu != other;
    return 0;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int gpu) {
    snprintf(text, (size_t)size, "0000:%02x:00.0", gpu + 1);
    return 0;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int gpu) {
    *pool = (cudaMemPool_t)(uintptr_t)(gpu + 1);
    return 0;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr asked, void* value) {
    *(uint64_t*)value = 0;
    return 0;
}

cudaError_t cudaDeviceSynchronize(void) {
    cudaError_t error = fake_any_capture() ? cudaErrorStreamCaptureUnsupported : 0;
    fake_count(DEVICE_SYNC, 0);
    fake_stop("device synchronized");
    if (error) fake_illegal("cudaDeviceSynchronize during a capture");
    return fake_error(error);
}

// -- the driver's functions, which PyTorch asks the runtime for -----------------------------------
typedef enum cudaDriverEntryPointQueryResult Answer;
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned version,
                                             unsigned long long flags, Answer* answer) {
    void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    char second[160];
    snprintf(second, sizeof second, "%s_v2", name);
    *found = driver ? dlsym(driver, second) : 0;
    if (driver && !*found) *found = dlsym(driver, name);
    if (answer) *answer = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return *found ? 0 : fake_error(cudaErrorSymbolNotFound);
}
cudaError_t cudaGetDriverEntryPoint(const char* name, void** found, unsigned long long flags,
                                    Answer* answer) {
    return cudaGetDriverEntryPointByVersion(name, found, CUDART_VERSION, flags, answer);
}
