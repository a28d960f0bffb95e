// libcuda: what PyTorch, Triton's launcher and hmc's flags call of it. build.py writes the rest.
#include "fake.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cuda.h"

enum {
    PATIENCE_SECONDS = 20
};

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int* version) { return (CUresult)cudaDriverGetVersion(version); }
CUresult cuDeviceGet(CUdevice* gpu, int number) {
    *gpu = number;
    return 0;
}
CUresult cuDeviceGetCount(int* count) { return (CUresult)cudaGetDeviceCount(count); }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute asked, CUdevice gpu) {
    return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)asked,
                                            gpu);  // the same numbers
}
CUresult cuDevicePrimaryCtxGetState(CUdevice gpu, unsigned* flags, int* active) {
    *flags = 0;
    *active = 1;
    return 0;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* made, CUdevice gpu) {
    *made = (CUcontext)(uintptr_t)(gpu + 1);
    return 0;
}
CUresult cuCtxGetCurrent(CUcontext* found) { return cuDevicePrimaryCtxRetain(found, fake_gpu); }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuCtxGetDevice(CUdevice* gpu) { return (CUresult)cudaGetDevice(gpu); }
// Statically linked runtimes (NVRTC has one) ask for tables of private functions.
CUresult cuGetExportTable(const void** table, const CUuuid* which) { return CUDA_ERROR_NOT_FOUND; }
CUresult cuGetErrorString(CUresult error, const char** text) {
    *text = "error of a played driver";
    return 0;
}
CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }

// -- words of pinned memory -----------------------------------------------------------------------
static int pinned(const void* at) {
    Place place = fake_range(at).place;
    if (place == PINNED || place == REGISTERED) return 1;
    fake_illegal("a stream is to see a word that is not pinned");
    return 0;
}
CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* there, void* at, unsigned flags) {
    *there = (CUdeviceptr)at;
    return pinned(at) ? 0 : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr at, cuuint32_t value,
                                 unsigned flags) {
    if (!pinned((void*)at)) return CUDA_ERROR_INVALID_VALUE;
    fake_count(WRITE_WORD, 0);
    fake_line("gpu%d stream %d writes %u", fake_stream(stream)->gpu, fake_stream(stream)->number,
              value);
    __atomic_store_n((uint32_t*)at, value, __ATOMIC_RELEASE);
    return 0;
}
// A real stream waits by itself; here whoever hands over does, and no step of his is counted for
// it.
CUresult cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr at, cuuint32_t value, unsigned flags) {
    time_t until = time(0) + PATIENCE_SECONDS;
    if (!pinned((void*)at)) return CUDA_ERROR_INVALID_VALUE;
    fake_count(WAIT_WORD, 0);
    fake_line("gpu%d stream %d waits for %u", fake_stream(stream)->gpu, fake_stream(stream)->number,
              value);
    while ((int32_t)(__atomic_load_n((uint32_t*)at, __ATOMIC_ACQUIRE) - value) < 0) {
        if (time(0) > until) {
            fake_illegal("a stream waits for a word for %d s", PATIENCE_SECONDS);
            return CUDA_ERROR_LAUNCH_TIMEOUT;
        }
        usleep(20);
    }
    return 0;
}

// -- modules and launches, for Triton -------------------------------------------------------------
CUresult cuPointerGetAttribute(void* found, CUpointer_attribute asked, CUdeviceptr at) {
    Range of = fake_range((void*)at);
    if (of.place == PAGEABLE) return CUDA_ERROR_INVALID_VALUE;
    if (asked == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
        *(unsigned*)found = of.place == DEVICE ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
    else *(CUdeviceptr*)found = asked == CU_POINTER_ATTRIBUTE_DEVICE_POINTER ? at : 0;
    return 0;
}
CUresult cuModuleLoadData(CUmodule* made, const void* image) {
    *made = (CUmodule)calloc(1, 8);
    return 0;
}
CUresult cuModuleLoadDataEx(CUmodule* made, const void* image, unsigned count,
                            CUjit_option* options, void** values) {
    return cuModuleLoadData(made, image);
}
CUresult cuModuleGetFunction(CUfunction* found, CUmodule module, const char* name) {
    *found = (CUfunction)strdup(name);
    return 0;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute asked, CUfunction function) {
    *value = asked == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
             : asked == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 128
                                                              : 0;
    return 0;
}
static CUresult launch(const unsigned* grid, unsigned threads, unsigned shared, CUstream stream,
                       CUfunction function) {
    char what[300];
    snprintf(what, sizeof what, "%u,%u,%u x %u, %u B: %s", grid[0], grid[1], grid[2], threads,
             shared, (const char*)function);
    if (threads > 1024 || shared > (unsigned)fake_shared_bytes() || grid[1] > 65535 ||
        grid[2] > 65535) {
        fake_illegal("launch of %s", what);
        return CUDA_ERROR_INVALID_VALUE;
    }
    fake_launched(stream, KERNEL, what);
    return 0;
}
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned a,
                        unsigned b, unsigned c, unsigned shared, CUstream stream, void** given,
                        void** more) {
    const unsigned grid[] = {x, y, z};
    return launch(grid, a * b * c, shared, stream, function);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* how, CUfunction function, void** given,
                          void** more) {
    const unsigned grid[] = {how->gridDimX, how->gridDimY, how->gridDimZ};
    unsigned threads = how->blockDimX * how->blockDimY * how->blockDimZ;
    return launch(grid, threads, how->sharedMemBytes, how->hStream, function);
}
