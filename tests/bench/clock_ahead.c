// Preloaded: the wall clock of a process is ahead by the seconds (int64) that the file CLOCK_AHEAD says, as soon as it says them.
// The monotonic clocks are left alone, as they are when a clock is set.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
static volatile long long *ahead;
static int (*real)(clockid_t, struct timespec *);
__attribute__((constructor)) static void begin(void) {
    real = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("CLOCK_AHEAD");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *at = fd < 0 ? MAP_FAILED : mmap(0, sizeof *ahead, PROT_READ, MAP_SHARED, fd, 0);
    if (at != MAP_FAILED) ahead = at;
}
int clock_gettime(clockid_t clock, struct timespec *t) {
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, t);
    if (!result && ahead && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) t->tv_sec += *ahead;
    return result;
}
// Waits until a time of the wall clock are told the kernel's. Times of a monotonic clock are those since the machine's start.
static const struct timespec *kernels(const struct timespec *until, struct timespec *own) {
    if (!ahead || !until || until->tv_sec < 1000000000) return until;
    *own = *until;
    own->tv_sec -= *ahead;
    return own;
}
#define WAIT(name, version, ...) \
    static int (*next)() ; \
    if (!next) next = dlvsym(RTLD_NEXT, name, version); \
    if (!next) next = dlsym(RTLD_NEXT, name); \
    struct timespec own; \
    return next(__VA_ARGS__)
int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
    WAIT("pthread_cond_timedwait", "GLIBC_2.3.2", condition, mutex, kernels(until, &own));
}
int pthread_cond_clockwait(pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until) {
    WAIT("pthread_cond_clockwait", "GLIBC_2.34", condition, mutex, clock, kernels(until, &own));
}
int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    WAIT("sem_timedwait", "GLIBC_2.34", semaphore, kernels(until, &own));
}
int sem_clockwait(sem_t *semaphore, clockid_t clock, const struct timespec *until) {
    WAIT("sem_clockwait", "GLIBC_2.34", semaphore, clock, kernels(until, &own));
}
int gettimeofday(struct timeval *t, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec, t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
