// Kernels: their names, as PyTorch's libraries register them, and launches, which are checked and
// counted and do nothing.
#include "fake.h"

#include <pthread.h>
#include <stdlib.h>

typedef struct {
    const void* function;
    const char* name;
} Kernel;
typedef struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} Launch;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Kernel* kernels;
static size_t known, room;
static int sorted;
static __thread Launch pushed[8];
static __thread int depth;

static int by_address(const void* one, const void* other) {
    uintptr_t a = (uintptr_t)((const Kernel*)one)->function;
    uintptr_t b = (uintptr_t)((const Kernel*)other)->function;
    return (a > b) - (a < b);
}

static const char* name_of(const void* function) {
    Kernel key = {function, 0}, *found;
    pthread_mutex_lock(&lock);
    if (!sorted) qsort(kernels, known, sizeof key, by_address);
    sorted = 1;
    found = bsearch(&key, kernels, known, sizeof key, by_address);
    pthread_mutex_unlock(&lock);
    return found ? found->name : "unknown";
}

void** __cudaRegisterFatBinary(void* binary) {
    static void* handle[4];
    return handle;
}
char __cudaInitModule(void** handle) { return 1; }
void __cudaRegisterFunction(void** handle, const char* function, char* device, const char* name,
                            int threads, void* a, void* b, void* c, void* d, int* size) {
    pthread_mutex_lock(&lock);
    if (known == room) kernels = realloc(kernels, (room = 2 * room + 4096) * sizeof *kernels);
    kernels[known++] = (Kernel){function, name};
    sorted = 0;
    pthread_mutex_unlock(&lock);
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                     struct CUstream_st* stream) {
    pushed[depth++] = (Launch){grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    const Launch* launch = pushed + --depth;
    *grid = launch->grid;
    *block = launch->block;
    *shared = launch->shared;
    *(cudaStream_t*)stream = launch->stream;
    return 0;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = (cudaKernel_t)function;
    return 0;
}

// Counts a launch of what has no function of PyTorch's: Triton's kernels, products of libraries.
void fake_launched(cudaStream_t handle, Kind kind, const char* what) {
    Stream* stream = fake_stream(handle);
    if (stream->gpu != fake_gpu)
        fake_illegal("%s on a stream of gpu%d while gpu%d is current", what, stream->gpu, fake_gpu);
    if (stream->graph) stream->graph->kernels++;
    else fake_count(kind, 0);
    fake_line("%s gpu%d stream %d %s", stream->graph ? "captured" : "launch", stream->gpu,
              stream->number, what);
}

static cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t shared,
                          cudaStream_t stream) {
    unsigned threads = block.x * block.y * block.z;
    char what[600];
    snprintf(what, sizeof what, "%u,%u,%u x %u, %zu B: %s", grid.x, grid.y, grid.z, threads, shared,
             name_of(function));
    if (!grid.x || !grid.y || !grid.z || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535 ||
        !threads || threads > 1024) {
        fake_illegal("launch of %s", what);
        return fake_error(cudaErrorInvalidConfiguration);
    }
    if (shared > (size_t)fake_shared_bytes()) {
        fake_illegal("shared memory of %s", what);
        return fake_error(cudaErrorInvalidValue);
    }
    if (fake_stream(stream)->gpu != fake_gpu) {
        fake_illegal("launch on another GPU's stream of %s", what);
        return fake_error(cudaErrorInvalidResourceHandle);
    }
    fake_launched(stream, KERNEL, what);
    return 0;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** given,
                             size_t shared, cudaStream_t stream) {
    return launch(function, grid, block, shared, stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** given,
                               size_t shared, cudaStream_t stream) {
    return launch((const void*)kernel, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* function, void** given) {
    return launch(function, how->gridDim, how->blockDim, how->dynamicSmemBytes, how->stream);
}

// The newest architecture PyTorch was compiled for (ARCHITECTURES: build.py) that the GPU runs.
static int compiled_for(void) {
    static const int all[] = {ARCHITECTURES};
    int best = all[0];
    for (size_t at = 0; at < sizeof all / sizeof *all; at++)
        if (all[at] <= fake_sm() && all[at] > best) best = all[at];
    return best;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* found, const void* function) {
    *found = (struct cudaFuncAttributes){0};
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 64;
    found->binaryVersion = found->ptxVersion = compiled_for();
    found->maxDynamicSharedSizeBytes = fake_shared_bytes();
    return 0;
}
cudaError_t cudaFuncSetAttribute(const void* function, enum cudaFuncAttribute which, int value) {
    if (which != cudaFuncAttributeMaxDynamicSharedMemorySize || value <= fake_shared_bytes())
        return 0;
    fake_illegal("%d B of shared memory asked for %s", value, name_of(function));
    return fake_error(cudaErrorInvalidValue);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int threads, size_t shared) {
    *blocks = 2;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                   const void* function,
                                                                   int threads, size_t shared,
                                                                   unsigned flags) {
    *blocks = 2;
    return 0;
}
cudaError_t cudaGetSymbolAddress(void** at, const void* symbol) {
    static char somewhere[1 << 16];
    *at = somewhere;
    return 0;
}
