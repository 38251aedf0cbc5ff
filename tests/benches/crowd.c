// An agent that becomes many processes: as many as CROWD=NUMBER says, all waiting, or with CROWD=bomb as many as it
// may, all forking without end. It prints a line when they are there.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static void wait_for_ever(void) {
    for (;;)
        pause();
}

int main(int count, char **arguments) {
    const char *crowd = "1";
    for (int i = 0; i < count; i++)
        if (!strncmp(arguments[i], "CROWD=", 6))
            crowd = arguments[i] + 6;
    if (!strcmp(crowd, "bomb")) {
        // Nobody reaps, and nobody stops when there is no room: each end makes room for the next.
        pid_t first = getpid();
        int full = 0;
        for (;;)
            if (fork() < 0 && !full && getpid() == first) {
                full = 1;
                write(1, "ready\n", 6);
            }
    }
    for (int i = 1; i < atoi(crowd); i++) {
        pid_t child = fork();
        if (child < 0) {
            write(1, "no room\n", 8);
            return 1;
        }
        if (child == 0)
            wait_for_ever();
    }
    write(1, "ready\n", 6);
    wait_for_ever();
}
