/* Preloaded into one of the factory's binaries: its wall clock is off by the seconds in the file $CLOCK_OFF, now and
 * whenever that changes. The machine's clock, and the clocks that only go forward, stay as they are. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long off(void) {
    static long last;
    char text[32] = {0};
    const char *path = getenv("CLOCK_OFF");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    /* The helper leaves the mounts where the file is: it keeps what it had at its start. */
    if (fd >= 0) {
        if (read(fd, text, sizeof text - 1) > 0)
            last = strtol(text, NULL, 10);
        close(fd);
    }
    return last;
}

__attribute__((constructor)) static void begin(void) {
    off();
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += off();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int result = syscall(SYS_gettimeofday, now, zone);
    if (result == 0)
        now->tv_sec += off();
    return result;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at)
        *at = now.tv_sec;
    return now.tv_sec;
}
