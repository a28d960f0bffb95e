// Streams and events. Work is done when it is handed over, so an event that was recorded has
// happened, and no stream ever has to wait for one.
#include "fake.h"

#include <stdlib.h>
#include <time.h>

typedef struct {
    int gpu, number, timed, recorded;
    double time;
    const Graph* of;
} Event;

static Stream defaults[MOST_GPUS];
static int streams = 1, events = 1;

static double now(void) {
    struct timespec found;
    clock_gettime(CLOCK_MONOTONIC, &found);
    return (double)found.tv_sec + 1e-9 * (double)found.tv_nsec;
}

// 0, 1 and 2 are the current GPU's default stream, called 0
Stream* fake_stream(cudaStream_t handle) {
    if ((uintptr_t)handle > 2) return (Stream*)handle;
    defaults[fake_gpu].gpu = fake_gpu;
    return defaults + fake_gpu;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* made, unsigned flags, int priority) {
    Stream* stream = calloc(1, sizeof *stream);
    stream->gpu = fake_gpu;
    stream->priority = priority;
    stream->number = __atomic_fetch_add(&streams, 1, __ATOMIC_RELAXED);
    *made = (cudaStream_t)stream;
    fake_line("new stream %d of gpu%d, priority %d", stream->number, stream->gpu, priority);
    return 0;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* made, unsigned flags) {
    return cudaStreamCreateWithPriority(made, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* made) {
    return cudaStreamCreateWithPriority(made, 0, 0);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
    *priority = fake_stream(stream)->priority;
    return 0;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    Stream* stream = fake_stream(handle);
    fake_count(STREAM_SYNC, 0);
    fake_stop("stream synchronized");
    return fake_idle(stream, "cudaStreamSynchronize");
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
    return fake_idle(fake_stream(handle), "cudaStreamQuery");
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t awaited, unsigned flags) {
    Stream* stream = fake_stream(handle);
    const Event* event = (const Event*)awaited;
    fake_count(WAIT, 0);
    fake_line("gpu%d stream %d waits for event %d", stream->gpu, stream->number, event->number);
    if (!event->recorded || event->of == stream->graph) return 0;
    // a real stream joins the capture of an event; here nobody does
    fake_illegal("event %d and stream %d are not of one capture", event->number, stream->number);
    stream->broken = 1;
    return fake_error(cudaErrorStreamCaptureIsolation);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* made, unsigned flags) {
    Event* event = calloc(1, sizeof *event);
    event->gpu = fake_gpu;
    event->timed = !(flags & cudaEventDisableTiming);
    event->number = __atomic_fetch_add(&events, 1, __ATOMIC_RELAXED);
    *made = (cudaEvent_t)event;
    return 0;
}
cudaError_t cudaEventCreate(cudaEvent_t* made) { return cudaEventCreateWithFlags(made, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return 0;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t recorded, cudaStream_t handle, unsigned flags) {
    Event* event = (Event*)recorded;
    Stream* stream = fake_stream(handle);
    if (event->gpu != stream->gpu) {
        fake_illegal("event of gpu%d recorded on a stream of gpu%d", event->gpu, stream->gpu);
        return fake_error(cudaErrorInvalidResourceHandle);
    }
    event->recorded = 1;
    event->time = now();
    event->of = stream->graph;
    fake_count(RECORD, 0);
    fake_line("event %d on gpu%d stream %d", event->number, stream->gpu, stream->number);
    return 0;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}
static cudaError_t outside(const Event* event) {
    return event->of ? fake_error(cudaErrorCapturedEvent) : 0;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    fake_count(EVENT_SYNC, 0);
    fake_stop("event synchronized");
    return outside((const Event*)event);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    cudaError_t error = fake_uncaptured("cudaEventQuery");
    return error ? error : outside((const Event*)event);
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    const Event *first = (const Event*)begin, *last = (const Event*)end;
    if (!first->timed || !last->timed || !first->recorded || !last->recorded) {
        fake_illegal("time between events that keep none, or were not recorded");
        return fake_error(cudaErrorInvalidResourceHandle);
    }
    *milliseconds = (float)((last->time - first->time) * 1e3);
    return 0;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* given) {
    if (!fake_stream(stream)->graph) function(given);
    return 0;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* given,
                                  unsigned flags) {
    function(stream, 0, given);
    return 0;
}
