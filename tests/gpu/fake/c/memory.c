// Memory of the GPUs and pinned memory of the host: mapped pages, and which range of addresses is
// what.
#define _GNU_SOURCE
#include "fake.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    PAGE = 4096
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Range* ranges;  // ascending, none over another
static int known, room;
static long long used[MOST_GPUS];

// The number of ranges that start at an address or before it; the lock is held.
static int before(uintptr_t at) {
    int low = 0, high = known;
    while (low < high) {
        int middle = (low + high) / 2;
        if (ranges[middle].start <= at) low = middle + 1;
        else high = middle;
    }
    return low;
}

static Range holding(uintptr_t at) {
    Range none = {at, 0, PAGEABLE, -1};
    int place = before(at);
    if (!place || at - ranges[place - 1].start >= ranges[place - 1].size) return none;
    return ranges[place - 1];
}

Range fake_range(const void* at) {
    Range found;
    pthread_mutex_lock(&lock);
    found = holding((uintptr_t)at);
    pthread_mutex_unlock(&lock);
    return found;
}

// CUDA takes copies of memory that it knows all of, or nothing.
int fake_uniform(const void* at, size_t bytes) {
    uintptr_t start = (uintptr_t)at, end = start + bytes;
    int index, uniform;
    pthread_mutex_lock(&lock);
    index = before(start);
    if (index && ranges[index - 1].start + ranges[index - 1].size > start) {
        uintptr_t reached = ranges[index - 1].start + ranges[index - 1].size;
        for (; reached < end && index < known && ranges[index].start == reached; index++) {
            if (ranges[index].place != REGISTERED || ranges[index - 1].place != REGISTERED) break;
            reached += ranges[index].size;
        }
        uniform = reached >= end;
    } else {
        uniform = index == known || ranges[index].start >= end;
    }
    pthread_mutex_unlock(&lock);
    return uniform;
}

static int insert(const void* at, size_t size, Place place) {
    uintptr_t start = (uintptr_t)at;
    int free_there, index;
    pthread_mutex_lock(&lock);
    index = before(start + size - 1);
    free_there = !index || ranges[index - 1].start + ranges[index - 1].size <= start;
    if (free_there) {
        if (known == room)
            ranges = realloc(ranges, (size_t)(room = 2 * room + 64) * sizeof *ranges);
        memmove(ranges + index + 1, ranges + index, (size_t)(known++ - index) * sizeof *ranges);
        ranges[index] = (Range){start, size, place, fake_gpu};
        if (place == DEVICE) used[fake_gpu] += (long long)size;
    }
    pthread_mutex_unlock(&lock);
    return free_there;
}

// Takes out the range that starts at an address and is of a kind; of size 0 where there is none.
static Range taken(const void* at, Place place) {
    Range found = {0, 0, PAGEABLE, -1};
    int index;
    pthread_mutex_lock(&lock);
    index = before((uintptr_t)at) - 1;
    if (index >= 0 && ranges[index].start == (uintptr_t)at && ranges[index].place == place) {
        found = ranges[index];
        memmove(ranges + index, ranges + index + 1, (size_t)(--known - index) * sizeof *ranges);
        if (place == DEVICE) used[found.gpu] -= (long long)found.size;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static size_t pages(size_t size) { return (size + PAGE - 1) / PAGE * PAGE; }

static cudaError_t map(void** at, size_t size, Place place) {
    *at = mmap(0, pages(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
               -1, 0);
    if (*at == MAP_FAILED) return fake_error(cudaErrorMemoryAllocation);
    insert(*at, size, place);
    return 0;
}

static cudaError_t unmap(void* at, Place place) {
    Range found = taken(at, place);
    if (!found.size) {
        fake_illegal("%p is freed, which is none's start", at);
        return fake_error(cudaErrorInvalidValue);
    }
    munmap(at, pages(found.size));
    return 0;
}

cudaError_t cudaMalloc(void** at, size_t size) {
    cudaError_t error = fake_uncaptured("cudaMalloc");
    if (error) return error;
    fake_stop("device memory allocated");
    fake_count(ALLOCATE, size);
    fake_line("allocate gpu%d %zu", fake_gpu, size);
    if (used[fake_gpu] + (long long)size > fake_gpu_bytes())
        return fake_error(cudaErrorMemoryAllocation);
    return map(at, size, DEVICE);
}
cudaError_t cudaFree(void* at) {
    cudaError_t error = at ? fake_uncaptured("cudaFree") : 0;
    if (!at || error) return error;
    fake_stop("device memory freed");
    fake_count(FREE, 0);
    return unmap(at, DEVICE);
}
cudaError_t cudaMallocAsync(void** at, size_t size, cudaStream_t stream) {
    return cudaMalloc(at, size);
}
cudaError_t cudaFreeAsync(void* at, cudaStream_t stream) { return cudaFree(at); }

cudaError_t cudaHostAlloc(void** at, size_t size, unsigned flags) {
    cudaError_t error = fake_uncaptured("cudaHostAlloc");
    if (error) return error;
    fake_stop("pinned memory allocated");
    fake_count(PIN, size);
    return map(at, size, PINNED);
}
cudaError_t cudaFreeHost(void* at) {
    if (!at) return 0;
    fake_stop("pinned memory freed");
    return unmap(at, PINNED);
}

cudaError_t cudaHostRegister(void* at, size_t size, unsigned flags) {
    fake_stop("memory pinned");
    fake_count(PIN, size);
    fake_line("pin %zu flags %u", size, flags);
    if (size && insert(at, size, REGISTERED)) return 0;
    fake_illegal("%zu bytes are pinned that are in part already", size);
    return fake_error(cudaErrorHostMemoryAlreadyRegistered);
}
cudaError_t cudaHostUnregister(void* at) {
    fake_stop("memory unpinned");
    return taken(at, REGISTERED).size ? 0 : fake_error(cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaMemGetInfo(size_t* left, size_t* all) {
    *all = (size_t)fake_gpu_bytes();
    *left = *all - (size_t)used[fake_gpu];
    return 0;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* found, const void* at) {
    Range of = fake_range(at);
    memset(found, 0, sizeof *found);
    found->type = of.place == DEVICE ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    found->device = of.gpu;
    if (of.place == PAGEABLE) {
        found->type = cudaMemoryTypeUnregistered;
        found->device = -2;  // cudaInvalidDeviceId
        return 0;
    }
    found->devicePointer = (void*)at;
    found->hostPointer = of.place == DEVICE ? 0 : (void*)at;
    return 0;
}
