#pragma once

#include <stddef.h>
#include <stdint.h>

// What a test asks of the fake driver, beside the CUDA functions that it exports under their own names.
//
// The fake has no threads. Streams are FIFOs; whenever any of its functions is called, a seeded scheduler runs some of
// the operations that are ready, of any stream; a call that blocks runs until what it waits for is done. Every
// operation is checked, when it is submitted, against a happens-before relation made of stream order, recorded events
// and host synchronisation; host threads count as one actor. Device memory is host memory that only operations of
// streams may touch; a test that reads it directly should have synchronised first.
//
// Time is simulated: a call takes 1 us of the host, a copy 5 us and its bytes at 25 GB/s.
//
// $CHUNKFT_FAKECUDA, read when the library is loaded, holds settings such as "seed=3,policy=lazy,pageable=1,devices=2,
// lockable=1048576".

#define FAKECUDA_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st;

enum {
  FAKECUDA_RANDOM = 0,  // each call runs a random number of ready operations
  FAKECUDA_LAZY = 1,    // nothing runs until somebody waits for it
  FAKECUDA_EAGER = 2,   // everything that is ready runs at once
};

enum {
  FAKECUDA_CONTEXTS = 0,
  FAKECUDA_STREAMS = 1,
  FAKECUDA_EVENTS = 2,
  FAKECUDA_ALLOCATIONS = 3,
  FAKECUDA_REGISTRATIONS = 4,
  FAKECUDA_PUSHED_CONTEXTS = 5,  // depth of the calling thread's context stack
  FAKECUDA_PENDING_OPERATIONS = 6,
};

struct fakecuda_range {
  const void* address;
  size_t bytes;
  int write;
};

// Back to a driver that was just initialised: everything alive is forgotten, device memory freed, counters are zero, no
// failure is armed, one device, random policy, page-locked memory required and unlimited.
FAKECUDA_EXPORT void fakecuda_reset(uint64_t seed);
FAKECUDA_EXPORT void fakecuda_policy(int policy);
FAKECUDA_EXPORT void fakecuda_set_devices(int count);
// Copies from and to memory that is not registered: refused as misuse (0, the default), or as a real driver treats
// pageable memory (1): the host may wait, the copy may also run later.
FAKECUDA_EXPORT void fakecuda_allow_pageable(int allowed);
// Registering more than `bytes` in all fails with CUDA_ERROR_OUT_OF_MEMORY.
FAKECUDA_EXPORT void fakecuda_set_lockable(size_t bytes);
// Host memory that is to count as device memory (a torch CPU tensor as a slot); and the end of that.
FAKECUDA_EXPORT void fakecuda_declare_device(void* address, size_t bytes);
FAKECUDA_EXPORT void fakecuda_undeclare_device(void* address);

// Enqueues an operation that touches `ranges` on `stream` and runs `body(argument)` when its turn comes (null: nothing).
// The body runs inside the driver and must not call it. Needs no current context. Returns a CUresult.
FAKECUDA_EXPORT int fakecuda_launch(struct CUstream_st* stream, const char* name, const struct fakecuda_range* ranges,
                                    size_t count, void (*body)(void*), void* argument, double microseconds);
// The host touches memory now.
FAKECUDA_EXPORT void fakecuda_host_read(const void* address, size_t bytes, const char* name);
FAKECUDA_EXPORT void fakecuda_host_write(const void* address, size_t bytes, const char* name);
// Runs everything that is pending. No synchronisation: the checker learns nothing of it.
FAKECUDA_EXPORT void fakecuda_drain(void);

// The `nth` call from now (1 is the next) of `function`, or of any when null, returns `code` and does nothing else;
// `forever`: every later one, too. Replaces what was armed before; nth = 0 disarms.
FAKECUDA_EXPORT void fakecuda_fail(const char* function, uint64_t nth, int code, int forever);
// After `operations` more have run, the device is broken: later operations have no effect and every call returns `code`.
FAKECUDA_EXPORT void fakecuda_break_after(uint64_t operations, int code);
// Whether the armed failure has struck.
FAKECUDA_EXPORT int fakecuda_failed(void);

// Calls of `function`, or of all when null, since the last reset of the counters; failed ones count.
FAKECUDA_EXPORT uint64_t fakecuda_calls(const char* function);
// Calls that made the host wait for the device, or might have: synchronisation, cuMemFree, copies of pageable memory.
FAKECUDA_EXPORT uint64_t fakecuda_host_syncs(void);
FAKECUDA_EXPORT void fakecuda_reset_counters(void);

FAKECUDA_EXPORT size_t fakecuda_alive(int what);
// Races and misuse so far, as text.
FAKECUDA_EXPORT size_t fakecuda_violations(void);
FAKECUDA_EXPORT const char* fakecuda_violation(size_t index);
FAKECUDA_EXPORT void fakecuda_forget_violations(void);

#ifdef __cplusplus
}
#endif
