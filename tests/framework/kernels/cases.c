/* Kernels of a few lines, one for each thing that an operating system does to its machine; CASE names the one to build.
   Invariant: what a kernel has to say is on COM1, and each one that ends says how. */
#include "pc.h"

#ifndef KIB
#define KIB 64 /* that `marks` prints */
#endif

struct multiboot { u32 flags, lower_kib, upper_kib; };
static struct multiboot *boot;

static void halt(void) { for (;;) __asm__ volatile("cli; hlt"); }

/* By the clock: it waits for n changes of the second. */
static void sleep_seconds(int n)
{
    for (u8 now, last = cmos(0); n > 0;)
        if ((now = cmos(0)) != last)
            last = now, n--;
}

static void hello(void) { say("HELLO\n"); power_off(); }
static void late(void) { sleep_seconds(3); hello(); }
static void spin(void) { say("SPINNING\n"); for (;;) ; }
static void panic_off(void) { say("KERNEL PANIC: page fault at 0xdeadbeef\nback trace\n"); power_off(); }
static void panic_halt(void) { say("thread 'main' panicked at src/main.rs:12\nback trace\n"); halt(); }
static void debug_exit(void) { say("DEBUG EXIT\n"); outl(0xf4, 0x10); outl(0x501, 0x10); say("STILL HERE\n"); halt(); }
static void reset_once(void) { say("RESET\n"); reset(); }
static void fault(void) { say("FAULT\n"); triple_fault(); }

static void pvpanic_isa(void)
{
    say("PVPANIC "); say_hex(inb(0x505)); say("\n");
    outb(0x505, 1);
    halt();
}

/* The count of boots is in CMOS, which a reset keeps. */
static void count_boots(int most, void (*again)(void))
{
    u8 n = cmos(0x70);
    say("BOOT "); say_number(n); say("\n");
    set_cmos(0x70, n >= most ? 0 : n + 1);
    if (n >= most)
        power_off();
    again();
}
static void ten_resets(void) { count_boots(10, reset); }
static void three_faults(void) { count_boots(3, triple_fault); }

static void memory(void) { say("UPPER "); say_number(boot->upper_kib); say(" KiB\n"); power_off(); }

static void processors(void)
{
    outw(0x510, 5); /* fw_cfg: FW_CFG_NB_CPUS */
    say("CPUS "); say_number(inb(0x511)); say("\n");
    power_off();
}

static void cpuid(void)
{
    u32 a, b, c, d;
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(1), "c"(0));
    say(c & 1u << 30 ? "RDRAND " : "no-RDRAND ");
    say(c & 1u << 26 ? "XSAVE " : "no-XSAVE ");
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    say(b & 1u << 7 ? "SMEP\n" : "no-SMEP\n");
    power_off();
}

static void debugcon(void)
{
    for (const char *s = "ON DEBUGCON\n"; *s; s++)
        outb(0xe9, *s), outb(0x402, *s);
    hello();
}

static void com2(void) { com_open(COM2); com_say(COM2, "ON COM2\n"); hello(); }

static void keyboard(void)
{
    outb(0x64, 0xA7);
    while (inb(0x64) & 1)
        inb(0x60);
    outb(0x64, 0xAE);
    say("KEYS\n");
    for (;;) {
        u8 status = inb(0x64);
        if (!(status & 1))
            continue;
        u8 code = inb(0x60);
        say(status & 0x20 ? "AUX " : "KEY "); say_hex(code); say("\n");
        if (code == 0x90) /* q is released */
            power_off();
    }
}

static void echo(void)
{
    say("ECHO\n");
    for (;;)
        if (inb(COM1 + 5) & 1) {
            u8 c = inb(COM1);
            say("GOT "); say_hex(c); say("\n");
            if (c == 'q')
                power_off();
        }
}

static void marks(void)
{
    say("MARK1\n");
    for (int i = 0; i < KIB * 1024 / 64; i++) {
        say_hex(i);
        say(" .....................................................\n");
    }
    say("MARK2\n");
    halt();
}

static void colours(void)
{
    say("\x1b[32mO\x1b[0mK\r\r\n");
    say("caf\xc3\xa9\nlogin: ");
    halt();
}

static void tap(void)
{
    say("TAP version 13\n1..3\nok 1 - memory\n# expected 4, got 5\nnot ok 2 - timer\nok 3 - disk # SKIP none\n");
    power_off();
}

void kernel(u32 magic, struct multiboot *info)
{
    (void)magic;
    boot = info;
    com_open(COM1);
    CASE();
}
