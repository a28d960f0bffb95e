// What was called, how often and with how many bytes, line by line where somebody asked; and who is
// told when a thread has to wait.
#define _GNU_SOURCE
#include "fake.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char* const names[KINDS] = {"kernel",      "product",
                                         "graph",       "memset",
                                         "to_gpu",      "to_gpu_pageable",
                                         "from_gpu",    "from_gpu_pageable",
                                         "on_gpu",      "peer",
                                         "stream_sync", "device_sync",
                                         "event_sync",  "record",
                                         "wait",        "wait_word",
                                         "write_word",  "allocate",
                                         "free",        "pin"};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long long calls[KINDS], bytes[KINDS];
static char* text;
static size_t length, room;
static int kept;
static FILE* file;
static void (*told)(const char*);

__attribute__((constructor)) static void open_file(void) {
    const char* name = getenv("HMC_FAKE_LOG");
    if (name && *name && (file = fopen(name, "a"))) setlinebuf(file);
}

void fake_count(Kind kind, size_t size) {
    pthread_mutex_lock(&lock);
    calls[kind]++;
    bytes[kind] += (long long)size;
    pthread_mutex_unlock(&lock);
}

static void append(const char* line) {
    pthread_mutex_lock(&lock);
    if (file) fprintf(file, "%s\n", line);
    if (kept) {
        size_t size = strlen(line);
        if (length + size + 2 > room) text = realloc(text, room = 2 * (length + size + 2));
        memcpy(text + length, line, size);
        length += size;
        text[length++] = '\n';
        text[length] = 0;
    }
    pthread_mutex_unlock(&lock);
}

static void write_line(const char* before, const char* format, va_list given) {
    char line[1024];
    int at;
    if (!kept && !file) return;
    at = snprintf(line, sizeof line, "%d %s", gettid(), before);
    vsnprintf(line + at, sizeof line - (size_t)at, format, given);
    append(line);
}

void fake_line(const char* format, ...) {
    va_list given;
    va_start(given, format);
    write_line("", format, given);
    va_end(given);
}

void fake_illegal(const char* format, ...) {
    va_list given;
    va_start(given, format);
    write_line("ILLEGAL ", format, given);
    va_end(given);
}

void fake_stop(const char* what) {
    fake_line("stop %s", what);
    if (told) told(what);
}

// -- for Python (log.py) --------------------------------------------------------------------------
void fake_keep(int on) { kept = on; }
void fake_tell_stops(void (*who)(const char*)) { told = who; }
void fake_note(const char* line) { fake_line("%s", line); }
const char* fake_log(void) { return text ? text : ""; }

void fake_reset(void) {
    pthread_mutex_lock(&lock);
    memset(calls, 0, sizeof calls);
    memset(bytes, 0, sizeof bytes);
    length = 0;
    if (text) *text = 0;
    pthread_mutex_unlock(&lock);
}

// "name calls bytes" a line, into `into`
void fake_counts(char* into, size_t size) {
    size_t at = 0;
    *into = 0;
    pthread_mutex_lock(&lock);
    for (int kind = 0; kind < KINDS && at < size; kind++)
        at += (size_t)snprintf(into + at, size - at, "%s %lld %lld\n", names[kind], calls[kind],
                               bytes[kind]);
    pthread_mutex_unlock(&lock);
}
