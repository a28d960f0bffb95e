// Copies and fills, which are done at once; what a capture takes of them is done at every replay.
#define _GNU_SOURCE
#include "fake.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    PAGE = 4096,
    LARGE = 1 << 20
};

static const char* const places[] = {"pageable", "pinned", "pinned", "gpu"};
static size_t most;  // copies of more bytes are counted only; 0: all are done

void fake_copy_at_most(size_t bytes) { most = bytes; }

void fake_move(void* to, const void* from, size_t bytes) {
    if (bytes && (!most || bytes <= most)) memmove(to, from, bytes);
}

static Kind way(Range to, Range from) {
    if (to.place == DEVICE && from.place == DEVICE) return to.gpu == from.gpu ? ON_GPU : PEER;
    if (to.place == DEVICE) return from.place == PAGEABLE ? TO_GPU_PAGEABLE : TO_GPU;
    return to.place == PAGEABLE ? FROM_GPU_PAGEABLE : FROM_GPU;
}

static void keep(Graph* graph, void* to, const void* from, size_t bytes) {
    if (graph->copied == graph->room) {
        graph->room = 2 * graph->room + 16;
        graph->copies = realloc(graph->copies, (size_t)graph->room * sizeof *graph->copies);
    }
    graph->copies[graph->copied++] = (Copy){to, from, bytes};
}

static cudaError_t copy(void* to, const void* from, size_t bytes, Stream* stream) {
    Range there = fake_range(to), here = fake_range(from);
    Kind kind = way(there, here);
    if (!bytes) return 0;
    if (there.place != DEVICE && here.place != DEVICE) fake_illegal("copy from host to host");
    if (!fake_uniform(to, bytes) || !fake_uniform(from, bytes)) {
        fake_illegal("copy of %zu bytes that are in part pinned, or end beyond memory", bytes);
        return fake_error(cudaErrorInvalidValue);
    }
    fake_line("%s from %s to %s %zu gpu%d stream %d", stream->graph ? "captured copy" : "copy",
              places[here.place], places[there.place], bytes, stream->gpu, stream->number);
    if (stream->graph) {
        if (kind == TO_GPU_PAGEABLE || kind == FROM_GPU_PAGEABLE)
            fake_illegal("pageable memory is copied in a capture");
        keep(stream->graph, to, from, bytes);
        return 0;
    }
    fake_count(kind, bytes);
    if (kind == TO_GPU_PAGEABLE || kind == FROM_GPU_PAGEABLE) fake_stop("pageable memory copied");
    fake_move(to, from, bytes);
    return 0;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    return copy(to, from, bytes, fake_stream(stream));
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind) {
    cudaError_t error = fake_uncaptured("cudaMemcpy");
    if (error) return error;
    fake_count(STREAM_SYNC, 0);
    fake_stop("copied while it waits");
    return copy(to, from, bytes, fake_stream(0));
}
cudaError_t cudaMemcpyPeerAsync(void* to, int there, const void* from, int here, size_t bytes,
                                cudaStream_t stream) {
    return copy(to, from, bytes, fake_stream(stream));
}

// Zeros of whole pages are pages that were never touched, and take no memory.
static void fill(char* to, int value, size_t bytes) {
    char* first = (char*)(((uintptr_t)to + PAGE - 1) / PAGE * PAGE);
    char* last = (char*)((uintptr_t)(to + bytes) / PAGE * PAGE);
    if (value || bytes < LARGE || madvise(first, (size_t)(last - first), MADV_DONTNEED)) {
        memset(to, value, bytes);
        return;
    }
    memset(to, 0, (size_t)(first - to));
    memset(last, 0, (size_t)(to + bytes - last));
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t handle) {
    Stream* stream = fake_stream(handle);
    Range range = fake_range(to);
    if (range.place == PAGEABLE || !fake_uniform(to, bytes)) {
        fake_illegal("fill of %zu bytes that are not all the GPU's", bytes);
        return fake_error(cudaErrorInvalidValue);
    }
    fake_line("%s %zu gpu%d stream %d", stream->graph ? "captured fill" : "fill", bytes,
              stream->gpu, stream->number);
    if (stream->graph) {
        stream->graph->memsets++;
        return 0;
    }
    fake_count(MEMSET, bytes);
    fill(to, value, bytes);
    return 0;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    return cudaMemsetAsync(to, value, bytes, 0);
}
